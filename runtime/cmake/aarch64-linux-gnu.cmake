# A toolchain for Debian's cross compiler (g++-aarch64-linux-gnu); what is built runs under qemu-user
# (qemu-aarch64 -L /usr/aarch64-linux-gnu):
#     cmake -S runtime -B build/aarch64 --toolchain runtime/cmake/aarch64-linux-gnu.cmake \
#           -DMLA_PYTHON=OFF
set(CMAKE_SYSTEM_NAME Linux)
set(CMAKE_SYSTEM_PROCESSOR aarch64)
set(CMAKE_C_COMPILER aarch64-linux-gnu-gcc)
set(CMAKE_CXX_COMPILER aarch64-linux-gnu-g++)
set(CMAKE_FIND_ROOT_PATH /usr/aarch64-linux-gnu)
set(CMAKE_FIND_ROOT_PATH_MODE_PROGRAM NEVER)
set(CMAKE_FIND_ROOT_PATH_MODE_LIBRARY ONLY)
set(CMAKE_FIND_ROOT_PATH_MODE_INCLUDE ONLY)
