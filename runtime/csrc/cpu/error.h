// The thread's error text. Never included by a file that is compiled for one instruction set.
#pragma once

#include "cpu/latent_attention.h"

namespace mla::cpu {

// Formats the text that last_error() gives and returns `status`.
#if defined(__GNUC__)
__attribute__((format(printf, 2, 3)))
#endif
Status fail(Status status, const char* format, ...);

}  // namespace mla::cpu
