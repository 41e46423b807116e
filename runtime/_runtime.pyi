"""The C++ part of mla_deploy.runtime."""



def version() -> str:
    """The version of mla-deploy that this module was built from."""

def cpu_features() -> list[str]:
    """
    The instruction sets that this CPU and its operating system offer to kernels.

    Of avx2, avx_vnni, avx512f, avx512_vnni, avx512_bf16, amx_int8, amx_bf16, neon,
    dotprod and i8mm those present, in this order.
    """
