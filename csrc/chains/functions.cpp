#include "chains/functions.h"

#include <ATen/ops/mul.h>
#include <torch/csrc/autograd/custom_function.h>

#include <utility>

namespace wus::chains {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

bool requires_grad(const Tensor& tensor) { return tensor.defined() && tensor.requires_grad(); }

// A function's arguments that may get a gradient, in its order. One that is missing has no edge.
class Arguments {
 public:
  Arguments(std::initializer_list<std::reference_wrapper<const OptionalTensor>> tensors) {
    int edge = 0;
    for (const OptionalTensor& tensor : tensors) {
      edges_.push_back(tensor && tensor->defined() ? edge++ : -1);
      wanted_.push_back(tensor && requires_grad(*tensor));
    }
  }

  // In forward: whether it will get one.
  bool wants(size_t argument) const { return wanted_[argument]; }
  // In backward: whether this pass needs it.
  bool needs(size_t argument, const AutogradContext& context) const {
    return wanted_[argument] && context.needs_input_grad(edges_[argument]);
  }

 private:
  std::vector<int> edges_;
  std::vector<bool> wanted_;
};

// What a function keeps besides tensors.
struct State : torch::CustomClassHolder {
  State(AlgorithmPtr algorithm, Act act, Arguments arguments)
      : algorithm(std::move(algorithm)), act(std::move(act)), arguments(std::move(arguments)) {}

  AlgorithmPtr algorithm;
  Act act;
  Arguments arguments;
  Size size{};  // in front of a pool
};

const char* const kState = "state";

// With which every function begins.
enum { kInput, kBias, kWeight };

// Keeps the state, and saves for backward: `saved`, and behind it what the weight's gradient needs,
// where the weight trains. Of a gradient that there is not, backward makes none.
void keep(AutogradContext* context, c10::intrusive_ptr<State> state, variable_list saved,
          const OptionalTensor& input, const OptionalTensor& weight) {
  if (state->arguments.wants(kWeight)) saved.insert(saved.end(), {*input, *weight});
  context->set_materialize_grads(false);
  context->save_for_backward(std::move(saved));
  context->saved_data[kState] = c10::IValue::make_capsule(std::move(state));
}

// A backward of one gradient without a derivative of its own says so, whatever was asked.
c10::intrusive_ptr<State> first_order(AutogradContext* context) {
  TORCH_CHECK(!at::GradMode::is_enabled(),
              "a fused step, and one through fused layers whose weights are at "
              "requires_grad=False, has no second derivative (create_graph=True); "
              "convert the model with fuse=False and full='stock'");
  return c10::static_intrusive_pointer_cast<State>(context->saved_data.at(kState).toCapsule());
}

Tensor value(const OptionalTensor& tensor) { return tensor.value_or(Tensor()); }

// What the weight's gradient needs, where the weight trains, from `first` on.
Trained trained_from(const variable_list& saved, size_t first) {
  return saved.size() > first ? Trained{saved[first], saved[first + 1]} : Trained{};
}

class Enter : public torch::autograd::Function<Enter> {
 public:
  static Tensor forward(AutogradContext* context, const Tensor& input) {
    context->set_materialize_grads(false);
    return input.contiguous(at::MemoryFormat::ChannelsLast);
  }
  static variable_list backward(AutogradContext*, const variable_list& grads) {
    return {grads[0].defined() ? grads[0].contiguous() : Tensor()};
  }
};

// act(conv(input) + bias); saves the mask, and the input where the weight trains.
class ConvAct : public torch::autograd::Function<ConvAct> {
 public:
  static Tensor forward(AutogradContext* context, const OptionalTensor& input,
                        const OptionalTensor& bias, const OptionalTensor& weight,
                        const AlgorithmPtr& algorithm, const Act& act) {
    auto [output, saved] = algorithm->forward(*input, value(bias), act);
    keep(context, c10::make_intrusive<State>(algorithm, act, Arguments{input, bias, weight}),
         {saved}, input, weight);
    return output;
  }

  static variable_list backward(AutogradContext* context, const variable_list& grads) {
    const auto state = first_order(context);
    if (!grads[0].defined()) return variable_list(kArguments);
    const auto saved = context->get_saved_variables();
    const auto needs = [&](int argument) { return state->arguments.needs(argument, *context); };
    const Trained trained = needs(kWeight) ? trained_from(saved, 1) : Trained{};
    auto [input, bias, weight] = state->algorithm->backward(dense(grads[0]), saved[0], state->act,
                                                            needs(kInput), needs(kBias), trained);
    return {input, needs(kBias) ? bias : Tensor(), weight, Tensor(), Tensor()};
  }

 private:
  enum { kAlgorithm = kWeight + 1, kAct, kArguments };
};

// act(conv(input) + bias + residual); saves the same.
class ConvAddAct : public torch::autograd::Function<ConvAddAct> {
 public:
  static Tensor forward(AutogradContext* context, const OptionalTensor& input,
                        const OptionalTensor& bias, const OptionalTensor& weight,
                        const OptionalTensor& residual, const AlgorithmPtr& algorithm,
                        const Act& act) {
    auto [output, saved] = algorithm->forward_add(*input, value(bias), *residual, act);
    keep(context,
         c10::make_intrusive<State>(algorithm, act, Arguments{input, bias, weight, residual}),
         {saved}, input, weight);
    return output;
  }

  static variable_list backward(AutogradContext* context, const variable_list& grads) {
    const auto state = first_order(context);
    if (!grads[0].defined()) return variable_list(kArguments);
    const auto saved = context->get_saved_variables();
    const auto needs = [&](int argument) { return state->arguments.needs(argument, *context); };
    const bool input = needs(kInput), weight = needs(kWeight), residual = needs(kResidual);
    Algorithm& algorithm = *state->algorithm;
    auto [passed, bias] = masked(algorithm.kernels, dense(grads[0]), saved[0], state->act,
                                 /*size=*/{}, input || weight || residual, needs(kBias));
    return {input ? algorithm.dgrad(passed) : Tensor(),
            bias,
            weight ? algorithm.wgrad(passed, trained_from(saved, 1)) : Tensor(),
            residual ? passed : Tensor(),
            Tensor(),
            Tensor()};
  }

 private:
  enum { kResidual = kWeight + 1, kAlgorithm, kAct, kArguments };
};

// act(batch_norm(conv(input) + bias) + residual) with batch statistics.
//
// Saves the mask; the convolution's output, which the statistics' gradient needs, where the
// gradient goes on to the input, the weight or gamma, or where the activation's slope follows from
// it; and the input where the weight trains. A bias in front of batch statistics has no influence:
// its gradient is exactly zero, or NaN where the numbers that it would be summed from are not
// finite.
class ConvNormAct : public torch::autograd::Function<ConvNormAct> {
 public:
  static Tensor forward(AutogradContext* context, const OptionalTensor& input,
                        const OptionalTensor& bias, const OptionalTensor& weight,
                        const OptionalTensor& gamma, const OptionalTensor& beta,
                        const OptionalTensor& residual, const AlgorithmPtr& algorithm,
                        const BatchNorm& norm, const Act& act) {
    const auto [z, mean, scale, shift, invstd] = algorithm->forward_norm(*input, value(bias), norm);
    auto [output, mask] = algorithm->kernels.apply.call(z, scale, shift, residual, act.kind,
                                                        act.slope, act.pool, /*need_mask=*/true);
    auto state = c10::make_intrusive<State>(algorithm, act,
                                            Arguments{input, bias, weight, gamma, beta, residual});
    state->size = {z.size(2), z.size(3)};
    const auto wants = [&](int argument) { return state->arguments.wants(argument); };
    variable_list saved{act.none() || act.smooth() ? Tensor() : mask};
    if (wants(kInput) || wants(kWeight) || wants(kGamma) || act.smooth()) {
      const Tensor none;
      saved.insert(saved.end(), {z, mean, invstd, value(gamma), act.smooth() ? scale : none,
                                 act.smooth() ? shift : none});
    }
    keep(context, std::move(state), std::move(saved), input, weight);
    return output;
  }

  static variable_list backward(AutogradContext* context, const variable_list& grads) {
    const auto state = first_order(context);
    if (!grads[0].defined()) return variable_list(kArguments);
    const auto saved = context->get_saved_variables();
    const auto needs = [&](int argument) { return state->arguments.needs(argument, *context); };
    const Kernels& kernels = state->algorithm->kernels;
    const Act& act = state->act;
    const Tensor grad = dense(grads[0]), &mask = saved[0];
    variable_list all(kArguments);
    if (saved.size() == 1) {
      const bool need_sums = needs(kBeta) || needs(kBias);
      auto [passed, sums] =
          masked(kernels, grad, mask, act, state->size, needs(kResidual), need_sums);
      if (needs(kBias)) all[kBias] = at::mul(sums, 0);
      if (needs(kBeta)) all[kBeta] = sums;
      if (needs(kResidual)) all[kResidual] = passed;
      return all;
    }
    const Tensor &z = saved[1], &mean = saved[2], &invstd = saved[3], &gamma = saved[4],
                 &scale = saved[5], &shift = saved[6];
    const auto [a, b, c, grad_beta, grad_gamma] = kernels.grad_coefficients.call(
        grad, z, mean, invstd, optional(gamma), optional(mask), optional(scale), optional(shift),
        act.kind, act.slope, act.pool);
    if (needs(kInput) || needs(kWeight) || needs(kResidual)) {
      const Trained trained = needs(kWeight) ? trained_from(saved, 7) : Trained{};
      auto [input, residual, weight] = state->algorithm->backward_norm(
          grad, z, {a, b, c, scale, shift}, mask, act, needs(kInput), needs(kResidual), trained);
      all[kInput] = input;
      all[kWeight] = weight;
      if (needs(kResidual)) all[kResidual] = residual;
    }
    if (needs(kBias)) all[kBias] = at::mul(c, 0);
    if (needs(kGamma)) all[kGamma] = grad_gamma;
    if (needs(kBeta)) all[kBeta] = grad_beta;
    return all;
  }

 private:
  enum { kGamma = kWeight + 1, kBeta, kResidual, kAlgorithm, kNorm, kAct, kArguments };
};

}  // namespace

Tensor chained(AlgorithmPtr algorithm, const Tensor& input, const Tensor& bias,
               const Tensor& trained, const std::optional<BatchNorm>& norm, const Tensor& residual,
               const Act& act) {
  if (!norm && !residual.defined() && act.none()) {
    if (const auto output = algorithm->alone(input, bias, trained)) return *output;
  }
  const OptionalTensor image = input, shift = optional(bias), weight = optional(trained),
                       summand = optional(residual);
  if (norm) {
    BatchNorm in_float = *norm;
    in_float.weight = single(norm->weight);
    in_float.bias = single(norm->bias);
    return ConvNormAct::apply(image, shift, weight, optional(in_float.weight),
                              optional(in_float.bias), summand, algorithm, in_float, act);
  }
  if (summand) return ConvAddAct::apply(image, shift, weight, summand, algorithm, act);
  return ConvAct::apply(image, shift, weight, algorithm, act);
}

Tensor entered(const Tensor& input, bool stock_like) {
  if (stock_like || input.suggest_memory_format() == at::MemoryFormat::ChannelsLast)
    return input.contiguous(at::MemoryFormat::ChannelsLast);
  return Enter::apply(input);
}

}  // namespace wus::chains
