// Compiled with +dotprod: see isa_neon.cpp.
#include "cpu/isa_neon.cpp"
