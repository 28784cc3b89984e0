#pragma once
#include <pybind11/pybind11.h>

namespace wus::deferral {

// What a plan depends on of a layer's tensors, besides their values: types, devices, sizes, and the
// type to which autocast casts them. The bias may be None, or of any kind.
pybind11::bytes signature(const pybind11::handle& input, const pybind11::handle& weight,
                          const pybind11::handle& bias);

}  // namespace wus::deferral
