// The Python module mla_deploy.runtime._runtime: the C++ runtime as Python sees it.
#include <nanobind/nanobind.h>

#include "cpu/features.h"
#include "python/bindings.h"

namespace nb = nanobind;

NB_MODULE(_runtime, m) {
    m.doc() = "The C++ part of mla_deploy.runtime.";

    m.def(
        "version", [] { return MLA_VERSION; }, nb::sig("def version() -> str"),
        "The version of mla-deploy that this module was built from.");

    m.def(
        "cpu_features",
        [] {
            nb::list names;
            for (const char* name : mla::cpu::feature_names()) names.append(name);
            return names;
        },
        nb::sig("def cpu_features() -> list[str]"),
        "The instruction sets that this CPU and its operating system offer to kernels.\n\n"
        "Of avx2, avx_vnni, avx512f, avx512_vnni, avx512_bf16, amx_int8, amx_bf16, neon,\n"
        "dotprod and i8mm those present, in this order.");

    bind_latent_attention(m);
#if defined(MLA_ENGINE)
    // At the end of the interpreter objects may live on, in cycles or in other threads.
    nb::set_leak_warnings(false);
    bind_engine(m);
    bind_generation(m);
#endif
}
