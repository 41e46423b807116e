// The parts of the Python module, one function a file.
#pragma once

#include <nanobind/nanobind.h>

void bind_latent_attention(nanobind::module_& m);
void bind_engine(nanobind::module_& m);
void bind_generation(nanobind::module_& m);
