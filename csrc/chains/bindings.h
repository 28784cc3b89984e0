#pragma once
#include <pybind11/pybind11.h>

namespace wus::chains {

void bind(pybind11::module_& module);

}  // namespace wus::chains
