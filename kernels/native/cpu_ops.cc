// The ops for ONNX Runtime's CPU provider: domain `tilewright`, version 1, float32.
#define ORT_API_MANUAL_INIT  // the library links no ONNX Runtime: the one that loads it hands its functions over
#include <onnxruntime_cxx_api.h>
#undef ORT_API_MANUAL_INIT

#include <algorithm>
#include <cstdint>
#include <functional>
#include <limits>
#include <memory>
#include <string>
#include <thread>
#include <vector>

#include "codebook.h"
#include "forms.h"
#include "silu_conv.h"

namespace {

using tilewright::Block;
using tilewright::Choice;
using tilewright::Codebook;
using tilewright::FaceInput;
using tilewright::Form;

struct Tensor {
  const float* data = nullptr;
  std::vector<int64_t> shape;

  int64_t last() const { return shape.back(); }
};

std::string text(const std::vector<int64_t>& shape) {
  std::string dims;
  for (int64_t dim : shape) dims += (dims.empty() ? "" : ", ") + std::to_string(dim);
  return "[" + dims + "]";
}

void require(bool holds, const std::string& what) {
  if (!holds) ORT_CXX_API_THROW(std::string(what), ORT_INVALID_ARGUMENT);
}

// A call's tensors by their places in the face; those that its form leaves out are empty.
std::vector<Tensor> inputs_of(const Ort::KernelContext& context, const Form& form, size_t places) {
  std::vector<Tensor> inputs(places);
  for (size_t i = 0; i < form.taken.size(); ++i) {
    const Ort::ConstValue value = context.GetInput(i);
    inputs[form.taken[i]] = {value.GetTensorData<float>(), value.GetTensorTypeAndShapeInfo().GetShape()};
  }
  return inputs;
}

Codebook codebook_of(const Tensor& tensor) {
  const auto& shape = tensor.shape;
  require(shape.size() == 3, "codebook " + text(shape) + " must be [G, K, D]");
  require(shape[1] > 0 && shape[1] <= std::numeric_limits<int32_t>::max() / 2,
          "codebook " + text(shape) + " must have 1 to 2^30 codewords a group");
  return {tensor.data, shape[0], shape[1], shape[2]};
}

// Blocks large enough to share a packed weight, and small enough to keep every core busy.
int64_t rows_of_a_block(int64_t rows, int64_t groups) {
  static const int64_t cores = std::max(1u, std::thread::hardware_concurrency());
  return std::clamp<int64_t>(rows * groups / (2 * cores), 32, 1024);
}

// Calls choose(choice, block) for all rows and groups on ONNX Runtime's own threads.
template <class Choose>
void choose_all(const Ort::KernelContext& context, std::vector<int64_t> shape, const Codebook& codebook,
                const Choose& choose) {
  shape.back() = codebook.groups;
  int32_t* indices = context.GetOutput(0, shape).GetTensorMutableData<int32_t>();
  shape.back() = codebook.groups * codebook.width;
  float* codes = context.GetOutput(1, shape).GetTensorMutableData<float>();
  int64_t rows = 1;
  for (size_t axis = 0; axis + 1 < shape.size(); axis++) rows *= shape[axis];
  struct Work {
    const Choose& choose;
    Choice choice;
    int64_t rows, step, blocks;
  };
  const int64_t step = rows_of_a_block(rows, codebook.groups);
  Work all{choose, {indices, codes}, rows, step, (rows + step - 1) / step};
  const auto one = [](void* data, size_t task) {
    const Work& work = *static_cast<const Work*>(data);
    // neighbours in time read the same group's weight
    const int64_t group = static_cast<int64_t>(task) / work.blocks, begin = task % work.blocks * work.step;
    work.choose(work.choice, Block{begin, std::min(begin + work.step, work.rows), group});
  };
  const int64_t tasks = all.blocks * codebook.groups;
  if (tasks > 0) context.ParallelFor(one, tasks, 0, &all);
}

using Dims = Ort::ShapeInferContext::Shape;

// Ort::ShapeInferContext::SetOutputShape of API 21 marks a named size in a way that newer ONNX Runtimes refuse.
void set_shape(OrtShapeInferContext* context, size_t output, ONNXTensorElementDataType type, const Dims& shape) {
  std::vector<int64_t> sizes;
  std::vector<const char*> names;
  for (const auto& dim : shape) {
    sizes.push_back(dim.IsInt() ? dim.AsInt() : -1);
    names.push_back(dim.IsInt() ? "" : dim.AsSym());
  }
  const OrtApi& api = Ort::GetApi();
  OrtTensorTypeAndShapeInfo* made = nullptr;
  Ort::ThrowOnError(api.CreateTensorTypeAndShapeInfo(&made));
  const Ort::TensorTypeAndShapeInfo owner(made);
  Ort::ThrowOnError(api.SetTensorElementType(made, type));
  Ort::ThrowOnError(api.SetDimensions(made, sizes.data(), sizes.size()));
  Ort::ThrowOnError(api.SetSymbolicDimensions(made, names.data(), names.size()));
  Ort::ThrowOnError(api.ShapeInferContext_SetOutputTypeShape(context, output, made));
}

bool number(const Ort::ShapeInferContext::SymbolicInteger& dim) { return dim.IsInt() && dim.AsInt() >= 0; }

bool known(const Ort::ShapeInferContext::SymbolicInteger& dim) { return !dim.IsInt() || number(dim); }

// What the codebook ops share: [..., G] and [..., G*D], where these sizes are numbers and the others numbers or names.
struct CodebookOutputs {
  static constexpr size_t outputs = 2;

  static ONNXTensorElementDataType type(size_t output) {
    return output == 0 ? ONNX_TENSOR_ELEMENT_DATA_TYPE_INT32 : ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT;
  }

  static void infer_shapes(OrtShapeInferContext* context, size_t inputs) {
    const Ort::ShapeInferContext shapes(&Ort::GetApi(), context);
    Dims shape = shapes.GetInputShape(0);
    const Dims& codebook = shapes.GetInputShape(inputs - 1);
    if (shape.empty() || !std::all_of(shape.begin(), shape.end() - 1, known)) return;
    if (codebook.size() != 3 || !number(codebook[0]) || !number(codebook[2])) return;
    shape.back() = codebook[0];
    set_shape(context, 0, type(0), shape);
    shape.back() = codebook[0].AsInt() * codebook[2].AsInt();
    set_shape(context, 1, type(1), shape);
  }
};

struct Nearest : CodebookOutputs {
  static constexpr const char* name = "CodebookNearest";
  static inline const std::vector<FaceInput> face{"latents", "codebook"};

  static void compute(const Ort::KernelContext& context, const std::vector<Tensor>& inputs) {
    const Tensor &latents = inputs[0], &codes = inputs[1];
    const Codebook codebook = codebook_of(codes);
    require(!latents.shape.empty() && latents.last() == codebook.groups * codebook.width,
            "latents " + text(latents.shape) + " must be [..., G*D] of codebook " + text(codes.shape));
    choose_all(context, latents.shape, codebook, [&](const Choice& choice, const Block& block) {
      tilewright::choose_nearest(latents.data, codebook, choice, block);
    });
  }
};

struct FromLogits : CodebookOutputs {
  static constexpr const char* name = "CodebookFromLogits";
  static inline const std::vector<FaceInput> face{"logits", "codebook"};

  static void compute(const Ort::KernelContext& context, const std::vector<Tensor>& inputs) {
    const Tensor &logits = inputs[0], &codes = inputs[1];
    const Codebook codebook = codebook_of(codes);
    require(!logits.shape.empty() && logits.last() == codebook.groups * codebook.size,
            "logits " + text(logits.shape) + " must be [..., G*K] of codebook " + text(codes.shape));
    choose_all(context, logits.shape, codebook, [&](const Choice& choice, const Block& block) {
      tilewright::choose_from_logits(logits.data, codebook, choice, block);
    });
  }
};

struct FromHidden : CodebookOutputs {
  static constexpr const char* name = "CodebookFromHidden";
  static inline const std::vector<FaceInput> face{"hidden", "weight", "bias?", "codebook"};

  static void compute(const Ort::KernelContext& context, const std::vector<Tensor>& inputs) {
    const Tensor &hidden = inputs[0], &weight = inputs[1], &bias = inputs[2], &codes = inputs[3];
    const Codebook codebook = codebook_of(codes);
    const int64_t choices = codebook.groups * codebook.size;
    require(weight.shape.size() == 2 && weight.shape[0] == choices,
            "weight " + text(weight.shape) + " must be [G*K, C] of codebook " + text(codes.shape));
    require(!bias.data || bias.shape == std::vector<int64_t>{choices},
            "bias " + text(bias.shape) + " must be [G*K] of codebook " + text(codes.shape));
    require(!hidden.shape.empty() && hidden.last() == weight.last(),
            "hidden " + text(hidden.shape) + " must be [..., C] of weight " + text(weight.shape));
    choose_all(context, hidden.shape, codebook, [&](const Choice& choice, const Block& block) {
      tilewright::choose_from_hidden(hidden.data, weight.last(), weight.data, bias.data, codebook, choice, block);
    });
  }
};

// Exceptions must not leave the library.
template <class Action>
OrtStatusPtr status_of(const Action& action) {
  try {
    action();
    return nullptr;
  } catch (const Ort::Exception& error) {
    return Ort::Status(error).release();
  } catch (const std::exception& error) {
    return Ort::Status(error).release();
  }
}

struct SiluConv {
  static constexpr const char* name = "SiluConv";
  static inline const std::vector<FaceInput> face{"x", "scale", "shift", "weight", "bias?", "residual?"};
  static constexpr size_t outputs = 1;

  static ONNXTensorElementDataType type(size_t) { return ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT; }

  static void infer_shapes(OrtShapeInferContext* context, size_t) {
    const Ort::ShapeInferContext shapes(&Ort::GetApi(), context);
    Dims shape = shapes.GetInputShape(0);
    const Dims& weight = shapes.GetInputShape(3);
    if (shape.size() != 4 || weight.size() != 4) return;
    shape[1] = weight[0];
    if (std::all_of(shape.begin(), shape.end(), known)) set_shape(context, 0, type(0), shape);
  }

  static void compute(const Ort::KernelContext& context, const std::vector<Tensor>& inputs) {
    const Tensor &x = inputs[0], &scale = inputs[1], &shift = inputs[2], &weight = inputs[3];
    const Tensor &bias = inputs[4], &residual = inputs[5];
    require(x.shape.size() == 4 && x.shape[1] > 0, "x " + text(x.shape) + " must be [B, C, H, W]");
    const std::vector<int64_t> per_channel{x.shape[0], x.shape[1], 1, 1};
    require(scale.shape == per_channel, "scale " + text(scale.shape) + " must be " + text(per_channel));
    require(shift.shape == per_channel, "shift " + text(shift.shape) + " must be " + text(per_channel));
    require(weight.shape.size() == 4 && weight.shape == std::vector<int64_t>{weight.shape[0], x.shape[1], 3, 3},
            "weight " + text(weight.shape) + " must be [O, " + std::to_string(x.shape[1]) + ", 3, 3]");
    const int64_t outputs = weight.shape[0];
    require(!bias.data || bias.shape == std::vector<int64_t>{outputs},
            "bias " + text(bias.shape) + " must be " + text({outputs}));
    const std::vector<int64_t> shape{x.shape[0], outputs, x.shape[2], x.shape[3]};
    require(!residual.data || residual.shape == shape, "residual " + text(residual.shape) + " must be " + text(shape));
    float* y = context.GetOutput(0, shape).GetTensorMutableData<float>();
    if (std::find(shape.begin(), shape.end(), 0) != shape.end()) return;
    const tilewright::SiluConv conv{x.shape[0], x.shape[1],  outputs,     x.shape[2], x.shape[3],    x.data,
                                    scale.data, shift.data, weight.data, bias.data,  residual.data, y};
    using Task = std::function<void(int64_t)>;
    tilewright::silu_conv(conv, [&](int64_t tasks, const Task& task) {
      const auto one = [](void* data, size_t k) { (*static_cast<const Task*>(data))(k); };
      context.ParallelFor(one, tasks, 0, const_cast<Task*>(&task));
    });
  }
};

template <class Op>
struct Kernel {
  const Form& form;

  OrtStatusPtr ComputeV2(OrtKernelContext* of_ort) {
    return status_of([&] {
      const Ort::KernelContext context(of_ort);
      Op::compute(context, inputs_of(context, form, Op::face.size()));
    });
  }
};

template <class Op>
struct CustomOp : Ort::CustomOpBase<CustomOp<Op>, Kernel<Op>, true> {
  const Form form;

  explicit CustomOp(Form taken) : form(std::move(taken)) {
    this->InferOutputShapeFn = [](const OrtCustomOp* op, OrtShapeInferContext* context) {
      const size_t inputs = static_cast<const CustomOp*>(op)->form.taken.size();
      return status_of([&] { Op::infer_shapes(context, inputs); });
    };
  }
  OrtStatusPtr CreateKernelV2(const OrtApi&, const OrtKernelInfo*, void** kernel) const {
    *kernel = new Kernel<Op>{form};
    return nullptr;
  }
  const char* GetName() const { return form.name.c_str(); }
  const char* GetExecutionProviderType() const { return "CPUExecutionProvider"; }
  size_t GetInputTypeCount() const { return form.taken.size(); }
  ONNXTensorElementDataType GetInputType(size_t) const { return ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT; }
  size_t GetOutputTypeCount() const { return Op::outputs; }
  ONNXTensorElementDataType GetOutputType(size_t index) const { return Op::type(index); }
};

template <class Op>
void add(Ort::CustomOpDomain& domain) {
  static std::vector<std::unique_ptr<CustomOp<Op>>> ops;  // the domain refers to them for as long as it lives
  for (Form& form : tilewright::forms_of(Op::name, Op::face)) {
    ops.push_back(std::make_unique<CustomOp<Op>>(std::move(form)));
    domain.Add(ops.back().get());
  }
}

Ort::CustomOpDomain domain_of_ops() {
  Ort::CustomOpDomain domain("tilewright");
  add<Nearest>(domain);
  add<FromLogits>(domain);
  add<FromHidden>(domain);
  add<SiluConv>(domain);
  return domain;
}

}  // namespace

extern "C" __attribute__((visibility("default"))) OrtStatus* ORT_API_CALL
RegisterCustomOps(OrtSessionOptions* options, const OrtApiBase* base) {
  const OrtApi* api = base->GetApi(ORT_API_VERSION);
  if (!api) {
    const std::string what = "this ONNX Runtime is older than API " + std::to_string(ORT_API_VERSION);
    return base->GetApi(1)->CreateStatus(ORT_FAIL, what.c_str());
  }
  Ort::InitApi(api);
  return status_of([&] {
    tilewright::instruction_set();  // throws where none can be taken
    static const Ort::CustomOpDomain domain = domain_of_ops();  // sessions refer to it for as long as they live
    Ort::ThrowOnError(api->AddCustomOpDomain(options, domain));
  });
}
