// Compiled with -mavxvnni: see isa_avx2.cpp.
#include "cpu/isa_avx2.cpp"
