"""Errors behind which nothing on a CUDA device can be trusted."""

from __future__ import annotations

# What CUDA, Triton, cuBLAS and cuDNN say, in lower case, when nothing after it on this device can be trusted.
_POISONING_TEXTS = (
    "cuda error",
    "triton error [cuda]",
    "cudaerror",  # cudaErrorIllegalAddress, as the runtime names it
    "cuda_error_",  # CUDA_ERROR_LAUNCH_FAILED, as the driver does
    "cuda driver error",
    "illegal memory access",
    "illegal instruction was encountered",
    "misaligned address",
    "unspecified launch failure",
    "device-side assert",
    "uncorrectable ecc error",
    "_status_execution_failed",  # of cuBLAS and cuDNN
    "_status_internal_error",
)

_HARMLESS_TYPES = ("OutOfMemoryError", "OutOfResources")

_HARMLESS_TEXT = "out of memory"  # which CUDA may call an error, too


def poisons_context(error: BaseException) -> bool:
    """Whether the process that met this error, or the one behind it, has to end before anything else is measured."""
    chain: list[BaseException] = []
    one: BaseException | None = error
    while one is not None and one not in chain:
        chain.append(one)
        one = one.__cause__ or one.__context__
    return any(_poisons(each) for each in chain)


def _poisons(error: BaseException) -> bool:
    text = str(error).lower()
    if type(error).__name__ in _HARMLESS_TYPES or _HARMLESS_TEXT in text:
        return False
    return type(error).__name__ == "AcceleratorError" or any(words in text for words in _POISONING_TEXTS)
