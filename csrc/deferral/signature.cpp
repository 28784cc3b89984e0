#include "deferral/signature.h"

#include <ATen/autocast_mode.h>
#include <torch/csrc/autograd/python_variable.h>

#include <string>

namespace wus::deferral {
namespace py = pybind11;
namespace {

class Signature {
 public:
  template <class T>
  void add(T value) {
    bytes_.append(reinterpret_cast<const char*>(&value), sizeof value);
  }

  void add(const at::Tensor& tensor) {
    add(tensor.scalar_type());
    add(tensor.device().type());
    add(tensor.device().index());
    add(tensor.dim());
    for (const int64_t size : tensor.sizes()) add(size);
  }

  py::bytes bytes() const { return bytes_; }

 private:
  std::string bytes_;
};

}  // namespace

py::bytes signature(const py::handle& input, const py::handle& weight, const py::handle& bias) {
  Signature all;
  const at::Tensor& own = THPVariable_Unpack(weight.ptr());
  const auto device = own.device().type();
  const bool autocasts =
      at::autocast::is_autocast_available(device) && at::autocast::is_autocast_enabled(device);
  all.add(autocasts ? at::autocast::get_autocast_dtype(device) : at::ScalarType::Undefined);
  all.add(THPVariable_Unpack(input.ptr()));
  all.add(own);
  all.add(Py_TYPE(bias.ptr()));
  if (THPVariable_Check(bias.ptr())) all.add(THPVariable_Unpack(bias.ptr()));
  return all.bytes();
}

}  // namespace wus::deferral
