#include "cuda/epilogue/dgrad_graph.h"

// Everything is looked up in what torch has loaded: nothing to link, nothing to load twice.
#define NV_CUDNN_FRONTEND_USE_DYNAMIC_LOADING
#include <c10/util/Exception.h>
#include <cudnn_frontend.h>
#include <dlfcn.h>
#include <stdlib.h>

#include <array>
#include <map>
#include <mutex>
#include <string>
#include <tuple>
#include <unordered_map>
#include <vector>

namespace cudnn_frontend {
void* cudnn_dlhandle = nullptr;  // declared there, to be defined by its user
}

namespace wus::cuda {
namespace {

namespace fe = cudnn_frontend;

#define WUS_TEXT_OF(macro) #macro
#define WUS_TEXT(macro) WUS_TEXT_OF(macro)

bool find_libraries() {
  static const bool found = [] {
    // Of several CUDA runtimes cudnn-frontend would take the oldest.
    const auto runtime = "libcudart.so." + std::to_string(CUDART_VERSION / 1000);
    setenv("CUDNN_FRONTEND_CUDART_LIB_NAME", runtime.c_str(), /*overwrite=*/0);
    fe::cudnn_dlhandle = dlopen("libcudnn.so." WUS_TEXT(CUDNN_MAJOR), RTLD_NOW | RTLD_NOLOAD);
    return fe::cudnn_dlhandle != nullptr;
  }();
  return found;
}

constexpr int64_t kMostWorkspace = int64_t{256} << 20;

enum Uid : int64_t { kGradOutput = 1, kWeight, kMask, kGradInput, kGradBias };

fe::DataType_t type_of(const DgradProblem& p) {
  switch (p.type) {
    case DgradProblem::Type::kHalf:
      return fe::DataType_t::HALF;
    case DgradProblem::Type::kBFloat16:
      return fe::DataType_t::BFLOAT16;
    default:
      return fe::DataType_t::FLOAT;
  }
}

fe::graph::Tensor_attributes tensor(Uid uid, fe::DataType_t type, std::array<int64_t, 4> nchw) {
  const auto [n, c, h, w] = nchw;
  return fe::graph::Tensor_attributes()
      .set_uid(uid)
      .set_data_type(type)
      .set_dim({n, c, h, w})
      .set_stride({h * w * c, 1, w * c, c});
}

class Graph : public DgradGraph {
 public:
  explicit Graph(const DgradProblem& p) {
    const auto type = type_of(p);
    const std::array<int64_t, 4> in{p.images, p.in_channels, p.in_height, p.in_width};
    graph_.set_io_data_type(type)
        .set_intermediate_data_type(fe::DataType_t::FLOAT)
        .set_compute_data_type(fe::DataType_t::FLOAT);
    const auto grad_output = graph_.tensor(
        tensor(kGradOutput, type, {p.images, p.out_channels, p.out_height, p.out_width}));
    const auto weight = graph_.tensor(
        tensor(kWeight, type, {p.out_channels, p.in_channels, p.kernel[0], p.kernel[1]}));
    const auto mask = graph_.tensor(tensor(kMask, fe::DataType_t::INT8, in));
    const auto dgrad = graph_.conv_dgrad(grad_output, weight,
                                         fe::graph::Conv_dgrad_attributes()
                                             .set_padding({p.padding[0], p.padding[1]})
                                             .set_stride({1, 1})
                                             .set_dilation({p.dilation[0], p.dilation[1]}));
    dgrad->set_dim({in.begin(), in.end()});
    const auto grad_input = graph_.pointwise(
        dgrad, mask, fe::graph::Pointwise_attributes().set_mode(fe::PointwiseMode_t::RELU_BWD));
    const auto made = tensor(kGradInput, type, in);
    grad_input->set_output(true)
        .set_uid(kGradInput)
        .set_data_type(type)
        .set_dim(made.get_dim())
        .set_stride(made.get_stride());
    if (!p.sum) return;
    const auto options = fe::graph::Reduction_attributes()
                             .set_mode(fe::ReductionMode_t::ADD)
                             .set_is_deterministic(true);
    graph_.reduction(grad_input, options)
        ->set_output(true)
        .set_uid(kGradBias)
        .set_data_type(fe::DataType_t::FLOAT)
        .set_dim({1, p.in_channels, 1, 1})
        .set_stride({p.in_channels, 1, p.in_channels, p.in_channels});
  }

  // Whether cuDNN has an engine; compiles its kernel.
  bool build(cudnnHandle_t handle, bool tf32) {
    if (graph_.validate().is_bad() || graph_.build_operation_graph(handle).is_bad() ||
        graph_.create_execution_plans({fe::HeurMode_t::A, fe::HeurMode_t::FALLBACK}).is_bad()) {
      return false;
    }
    std::vector<fe::NumericalNote_t> unwanted{fe::NumericalNote_t::NONDETERMINISTIC,
                                              fe::NumericalNote_t::DOWN_CONVERT_INPUTS,
                                              fe::NumericalNote_t::REDUCED_PRECISION_REDUCTION};
    if (!tf32) unwanted.push_back(fe::NumericalNote_t::TENSOR_CORE);
    graph_.deselect_numeric_notes(unwanted).deselect_workspace_greater_than(kMostWorkspace);
    if (graph_.check_support().is_bad()) return false;
    if (graph_.build_plans(fe::BuildPlanPolicy_t::HEURISTICS_CHOICE).is_bad()) return false;
    int64_t bytes = 0;
    if (graph_.get_workspace_size(bytes).is_bad()) return false;
    workspace_ = static_cast<size_t>(bytes);
    return true;
  }

  size_t workspace() const override { return workspace_; }

  void run(cudnnHandle_t handle, const DgradOperands& o, void* workspace) override {
    std::unordered_map<int64_t, void*> operands{{kGradOutput, const_cast<void*>(o.grad_output)},
                                                {kWeight, const_cast<void*>(o.weight)},
                                                {kMask, const_cast<void*>(o.mask)},
                                                {kGradInput, o.grad_input}};
    if (o.grad_bias) operands[kGradBias] = o.grad_bias;
    const std::lock_guard lock(mutex_);  // a plan serves one thread at a time
    auto status = graph_.execute(handle, operands, workspace);
    TORCH_CHECK(status.is_good(), "cuDNN's graph of data gradient, mask and bias gradient failed: ",
                status.get_message());
  }

 private:
  fe::graph::Graph graph_;
  size_t workspace_ = 0;
  std::mutex mutex_;
};

std::shared_ptr<DgradGraph> built(cudnnHandle_t handle, const DgradProblem& problem) {
  if (!find_libraries()) return nullptr;
  try {
    const auto graph = std::make_shared<Graph>(problem);
    const bool half = problem.type != DgradProblem::Type::kFloat;
    return graph->build(handle, half || problem.tf32) ? graph : nullptr;
  } catch (const std::exception&) {  // cudnn-frontend throws where a library lacks a function
    return nullptr;
  }
}

}  // namespace

bool DgradProblem::operator<(const DgradProblem& other) const {
  const auto key = [](const DgradProblem& p) {
    return std::tuple(p.device, p.type, p.tf32, p.sum, p.images, p.in_channels, p.in_height,
                      p.in_width, p.out_channels, p.out_height, p.out_width, p.kernel[0],
                      p.kernel[1], p.padding[0], p.padding[1], p.dilation[0], p.dilation[1]);
  };
  return key(*this) < key(other);
}

std::shared_ptr<DgradGraph> dgrad_graph(cudnnHandle_t handle, const DgradProblem& problem,
                                        bool may_build) {
  static std::mutex mutex;
  // Never destroyed: cuDNN may be gone by the time statics are.
  static auto& graphs = *new std::map<DgradProblem, std::shared_ptr<DgradGraph>>;
  const std::lock_guard lock(mutex);
  const auto found = graphs.find(problem);
  if (found != graphs.end()) return found->second;
  if (!may_build) return nullptr;
  return graphs[problem] = built(handle, problem);
}

}  // namespace wus::cuda
