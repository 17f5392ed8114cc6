// The ops for ONNX Runtime's CPU provider: domain `tilewright`, version 1, float32.
#define ORT_API_MANUAL_INIT  // the library links no ONNX Runtime: the one that loads it hands its functions over
#include <onnxruntime_cxx_api.h>
#undef ORT_API_MANUAL_INIT

#include <algorithm>
#include <cstdint>
#include <functional>
#include <limits>
#include <string>
#include <thread>
#include <vector>

#include "codebook.h"
#include "silu_conv.h"

namespace {

using tilewright::Block;
using tilewright::Choice;
using tilewright::Codebook;

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

Tensor input(const Ort::KernelContext& context, size_t index) {
  const Ort::ConstValue value = context.GetInput(index);
  if (!value) return {};  // optional, and left out
  return {value.GetTensorData<float>(), value.GetTensorTypeAndShapeInfo().GetShape()};
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

struct Nearest {
  static constexpr const char* name = "CodebookNearest";
  static constexpr size_t inputs = 2, optional = inputs;  // none

  static void compute(const Ort::KernelContext& context) {
    const Tensor latents = input(context, 0), codes = input(context, 1);
    const Codebook codebook = codebook_of(codes);
    require(!latents.shape.empty() && latents.last() == codebook.groups * codebook.width,
            "latents " + text(latents.shape) + " must be [..., G*D] of codebook " + text(codes.shape));
    choose_all(context, latents.shape, codebook, [&](const Choice& choice, const Block& block) {
      tilewright::choose_nearest(latents.data, codebook, choice, block);
    });
  }
};

struct FromLogits {
  static constexpr const char* name = "CodebookFromLogits";
  static constexpr size_t inputs = 2, optional = inputs;  // none

  static void compute(const Ort::KernelContext& context) {
    const Tensor logits = input(context, 0), codes = input(context, 1);
    const Codebook codebook = codebook_of(codes);
    require(!logits.shape.empty() && logits.last() == codebook.groups * codebook.size,
            "logits " + text(logits.shape) + " must be [..., G*K] of codebook " + text(codes.shape));
    choose_all(context, logits.shape, codebook, [&](const Choice& choice, const Block& block) {
      tilewright::choose_from_logits(logits.data, codebook, choice, block);
    });
  }
};

struct FromHidden {
  static constexpr const char* name = "CodebookFromHidden";
  static constexpr size_t inputs = 4, optional = 2;

  static void compute(const Ort::KernelContext& context) {
    const Tensor hidden = input(context, 0), weight = input(context, 1), bias = input(context, 2);
    const Tensor codes = input(context, 3);
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

ONNXTensorElementDataType output_type(size_t output) {
  return output == 0 ? ONNX_TENSOR_ELEMENT_DATA_TYPE_INT32 : ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT;
}

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

// Ort::ShapeInferContext::SetOutputShape of API 21 marks a named size in a way that newer ONNX Runtimes refuse.
void set_shape(OrtShapeInferContext* context, size_t output, ONNXTensorElementDataType type,
               const Ort::ShapeInferContext::Shape& shape) {
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

// [..., G] and [..., G*D], where these sizes are numbers and the leading ones are numbers or names.
void infer_shapes(OrtShapeInferContext* context, size_t codebook_input) {
  const Ort::ShapeInferContext inputs(&Ort::GetApi(), context);
  Ort::ShapeInferContext::Shape shape = inputs.GetInputShape(0);
  const Ort::ShapeInferContext::Shape& codebook = inputs.GetInputShape(codebook_input);
  const auto number = [](const auto& dim) { return dim.IsInt() && dim.AsInt() >= 0; };
  const auto known = [&](const auto& dim) { return !dim.IsInt() || number(dim); };
  if (shape.empty() || !std::all_of(shape.begin(), shape.end() - 1, known)) return;
  if (codebook.size() != 3 || !number(codebook[0]) || !number(codebook[2])) return;
  shape.back() = codebook[0];
  set_shape(context, 0, output_type(0), shape);
  shape.back() = codebook[0].AsInt() * codebook[2].AsInt();
  set_shape(context, 1, output_type(1), shape);
}

template <class Op>
struct Kernel {
  OrtStatusPtr ComputeV2(OrtKernelContext* context) {
    return status_of([&] { Op::compute(Ort::KernelContext(context)); });
  }
};

template <class Op>
struct CustomOp : Ort::CustomOpBase<CustomOp<Op>, Kernel<Op>, true> {
  CustomOp() {
    this->InferOutputShapeFn = [](const OrtCustomOp*, OrtShapeInferContext* context) {
      return status_of([&] { infer_shapes(context, Op::inputs - 1); });
    };
  }
  OrtStatusPtr CreateKernelV2(const OrtApi&, const OrtKernelInfo*, void** kernel) const {
    *kernel = new Kernel<Op>;
    return nullptr;
  }
  const char* GetName() const { return Op::name; }
  const char* GetExecutionProviderType() const { return "CPUExecutionProvider"; }
  size_t GetInputTypeCount() const { return Op::inputs; }
  ONNXTensorElementDataType GetInputType(size_t) const { return ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT; }
  OrtCustomOpInputOutputCharacteristic GetInputCharacteristic(size_t index) const {
    return index == Op::optional ? INPUT_OUTPUT_OPTIONAL : INPUT_OUTPUT_REQUIRED;
  }
  size_t GetOutputTypeCount() const { return 2; }
  ONNXTensorElementDataType GetOutputType(size_t index) const { return output_type(index); }
};

// Neither its inputs nor its output are those of the codebook ops.
struct SiluConvKernel {
  OrtStatusPtr ComputeV2(OrtKernelContext* context) {
    return status_of([&] { compute(Ort::KernelContext(context)); });
  }

  static void compute(const Ort::KernelContext& context) {
    const Tensor x = input(context, 0), scale = input(context, 1), shift = input(context, 2);
    const Tensor weight = input(context, 3), bias = input(context, 4), residual = input(context, 5);
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

struct SiluConvOp : Ort::CustomOpBase<SiluConvOp, SiluConvKernel, true> {
  static constexpr size_t inputs = 6, optional = 4;  // the last two

  SiluConvOp() {
    InferOutputShapeFn = [](const OrtCustomOp*, OrtShapeInferContext* context) {
      return status_of([&] {
        const Ort::ShapeInferContext shapes(&Ort::GetApi(), context);
        Ort::ShapeInferContext::Shape shape = shapes.GetInputShape(0);
        const Ort::ShapeInferContext::Shape& weight = shapes.GetInputShape(3);
        const auto known = [](const auto& dim) { return !dim.IsInt() || dim.AsInt() >= 0; };
        if (shape.size() != 4 || weight.size() != 4) return;
        shape[1] = weight[0];
        if (std::all_of(shape.begin(), shape.end(), known)) {
          set_shape(context, 0, ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT, shape);
        }
      });
    };
  }
  OrtStatusPtr CreateKernelV2(const OrtApi&, const OrtKernelInfo*, void** kernel) const {
    *kernel = new SiluConvKernel;
    return nullptr;
  }
  const char* GetName() const { return "SiluConv"; }
  const char* GetExecutionProviderType() const { return "CPUExecutionProvider"; }
  size_t GetInputTypeCount() const { return inputs; }
  ONNXTensorElementDataType GetInputType(size_t) const { return ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT; }
  OrtCustomOpInputOutputCharacteristic GetInputCharacteristic(size_t index) const {
    return index < optional ? INPUT_OUTPUT_REQUIRED : INPUT_OUTPUT_OPTIONAL;
  }
  size_t GetOutputTypeCount() const { return 1; }
  ONNXTensorElementDataType GetOutputType(size_t) const { return ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT; }
};

Ort::CustomOpDomain domain_of_ops() {
  static const CustomOp<Nearest> nearest;
  static const CustomOp<FromLogits> from_logits;
  static const CustomOp<FromHidden> from_hidden;
  static const SiluConvOp silu_conv;
  Ort::CustomOpDomain domain("tilewright");
  domain.Add(&nearest);
  domain.Add(&from_logits);
  domain.Add(&from_hidden);
  domain.Add(&silu_conv);
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
