# Sources of the latent-attention kernels. A file isa_*.cpp holds one instruction set's kernels and
# is compiled for it alone; dispatch.cpp enters it only where the CPU has it.
find_package(Threads REQUIRED)
target_link_libraries(mla_cpu PUBLIC Threads::Threads)
target_sources(mla_cpu PRIVATE
    csrc/cpu/absorbed.cpp
    csrc/cpu/dispatch.cpp
    csrc/cpu/expanded.cpp
    csrc/cpu/latent_attention.cpp
    csrc/cpu/portable.cpp
    csrc/cpu/thread_pool.cpp
    csrc/cpu/weights.cpp
)
# Fused multiply-adds are written where they are meant: contracted by the compiler they would
# change the codes that append writes.
set_source_files_properties(csrc/cpu/portable.cpp PROPERTIES COMPILE_OPTIONS "-ffp-contract=off")

function(mla_add_isa source)
    target_sources(mla_cpu PRIVATE csrc/cpu/${source})
    set_source_files_properties(csrc/cpu/${source} PROPERTIES
        COMPILE_OPTIONS "-O3;-ffp-contract=off;-fno-math-errno;${ARGN}")
endfunction()

if(CMAKE_SYSTEM_PROCESSOR MATCHES "^(x86_64|amd64|AMD64)$")
    target_compile_definitions(mla_cpu PRIVATE MLA_CPU_X86)
    set(avx512 -mavx512f -mavx512bw -mavx512dq -mavx512vl -mavx512vnni -mavx2 -mfma -mf16c)
    # GCC 12 takes the headers' own undefined registers for ours (its bug 105593).
    list(APPEND avx512 -Wno-uninitialized -Wno-maybe-uninitialized)
    mla_add_isa(isa_avx2.cpp -mavx2 -mfma -mf16c)
    mla_add_isa(isa_avx2_vnni.cpp -mavx2 -mfma -mf16c -mavxvnni)
    mla_add_isa(isa_avx512.cpp ${avx512})
    mla_add_isa(isa_avx512_bf16.cpp ${avx512} -mavx512bf16)
    mla_add_isa(isa_amx.cpp ${avx512} -mavx512bf16 -mamx-tile -mamx-int8 -mamx-bf16)
elseif(CMAKE_SYSTEM_PROCESSOR MATCHES "^(aarch64|arm64|ARM64)$")
    target_compile_definitions(mla_cpu PRIVATE MLA_CPU_ARM)
    mla_add_isa(isa_neon.cpp)
    mla_add_isa(isa_neon_dotprod.cpp -march=armv8.2-a+dotprod)
    mla_add_isa(isa_neon_i8mm.cpp -march=armv8.2-a+dotprod+i8mm)
endif()

# Built only when asked for: ninja cpu_attention_benchmark.
add_executable(cpu_attention_benchmark EXCLUDE_FROM_ALL ../benchmarks/cpu_attention.cpp)
target_link_libraries(cpu_attention_benchmark PRIVATE mla_cpu)
target_compile_options(cpu_attention_benchmark PRIVATE
    -O3 -march=native -Wno-uninitialized -Wno-maybe-uninitialized)
