#include "python/errors.h"

#include <nanobind/nanobind.h>

#include <optional>
#include <string>

namespace nb = nanobind;
using namespace nb::literals;

namespace {

using mla::core::Error;

// The class of mla_deploy.errors for a status.
const char* class_of(mla_status status) {
    switch (status) {
        case MLA_BAD_BUNDLE:
            return "BundleError";
        case MLA_BAD_GRAPH:
            return "GraphError";
        case MLA_BAD_KERNELS:
            return "KernelsError";
        case MLA_CACHE_FULL:
        case MLA_CONTEXT_FULL:
        case MLA_BAD_SESSION_FILE:
        case MLA_BUSY:
        case MLA_CANCELLED:
        case MLA_MODEL_FAILED:
            return "SessionError";
        case MLA_FILE_ERROR:  // of writing; of reading see session_failure_if
            return "OutputError";
        default:  // arguments, onnxruntime, memory
            return "UsageError";
    }
}

// A text with whatever a path or a library of the system says in it.
nb::object text_of(const std::optional<std::string>& text) {
    if (!text) return nb::none();
    return nb::steal(
        PyUnicode_DecodeUTF8(text->data(), static_cast<Py_ssize_t>(text->size()), "replace"));
}

void raise(const char* name, const Error& error) {
    const Error::Fields& fields = error.fields();
    try {
        const nb::object type = nb::module_::import_("mla_deploy.errors").attr(name);
        const nb::object made =
            type(text_of(fields.what), "found"_a = text_of(fields.found),
                 "allowed"_a = text_of(fields.allowed), "hint"_a = text_of(fields.next));
        PyErr_SetObject(type.ptr(), made.ptr());
    } catch (nb::python_error& failure) {  // such as an interrupt in between
        failure.restore();
    }
}

}  // namespace

void register_errors() {
    nb::register_exception_translator([](const std::exception_ptr& thrown, void*) {
        try {
            std::rethrow_exception(thrown);
        } catch (const SessionFailure& failure) {
            raise("SessionError", failure.error);
        } catch (const Error& error) {
            raise(class_of(error.status()), error);
        }
    });
}
