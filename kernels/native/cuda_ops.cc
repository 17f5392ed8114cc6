// The ops for ONNX Runtime's CUDA provider: domain `tilewright`, version 1; float32, float16, bfloat16.
//
// An op is its plan, as in kernels/*.py: from the shapes of a call it says which kernel, with what sizes and grid, and
// what it gives. Kernels are cubins, compiled for the sizes that a network keeps and for any number of tokens.
#define ORT_API_MANUAL_INIT  // the library links no ONNX Runtime: the one that loads it hands its functions over
#include <onnxruntime_cxx_api.h>
#undef ORT_API_MANUAL_INIT

#include <algorithm>
#include <array>
#include <cstdio>
#include <functional>
#include <limits>
#include <memory>
#include <numeric>
#include <string>
#include <utility>
#include <vector>

#include "cubins.h"
#include "forms.h"

#ifdef TILEWRIGHT_ON_CPU  // tests run all but the kernels, under a driver of their own
constexpr const char* provider = "CPUExecutionProvider";
#else
constexpr const char* provider = "CUDAExecutionProvider";
#endif

namespace {

using tilewright::Error;
using tilewright::FaceInput;
using tilewright::Form;
using Shape = std::vector<int64_t>;

std::string text(const Shape& shape) {
  std::string dims;
  for (int64_t dim : shape) dims += (dims.empty() ? "" : ", ") + std::to_string(dim);
  return "[" + dims + "]";
}

int64_t product(const Shape& shape) {
  return std::accumulate(shape.begin(), shape.end(), int64_t{1}, std::multiplies<>());
}

// A shape with another last axis.
Shape with_last(Shape shape, int64_t last) {
  shape.back() = last;
  return shape;
}

struct Attributes {
  int64_t heads = 0, interleaved = 0;
  float epsilon = 0;
};

// The shapes that a call comes with, in the order of the face.
class Inputs {
 public:
  Inputs(const std::vector<FaceInput>& face, std::vector<std::unique_ptr<Shape>> shapes)
      : face_(face), shapes_(std::move(shapes)) {}

  bool given(size_t i) const { return shapes_[i] != nullptr; }

  const Shape& of_rank(size_t i, size_t least, size_t most) const {
    const Shape& shape = *shapes_[i];
    if (shape.size() < least || shape.size() > most) {
      throw Error(name(i) + " " + text(shape) + " has " + std::to_string(shape.size()) + " axes, not " +
                  std::to_string(least));
    }
    return shape;
  }

  // The rows [..., last], however many axes they have.
  const Shape& rows(size_t i) const { return of_rank(i, 1, std::numeric_limits<size_t>::max()); }

  void require(size_t i, const Shape& expected) const {
    if (!given(i) || *shapes_[i] == expected) return;
    throw Error(name(i) + " " + text(*shapes_[i]) + " must be " + text(expected));
  }

  const std::string& name(size_t i) const { return face_[i].name; }

 private:
  const std::vector<FaceInput>& face_;
  std::vector<std::unique_ptr<Shape>> shapes_;
};

// One axis of a grid: programs for each length, a block of it each.
struct Axis {
  std::vector<int64_t> lengths{1};
  const char* block = nullptr;  // the cubin's; none: one program each

  int64_t programs(const tilewright::Cubin& cubin) const {
    const int64_t size = block ? std::max<int64_t>(1, cubin.block(block)) : 1;
    int64_t all = 0;
    for (int64_t length : lengths) all += (length + size - 1) / size;
    return all;
  }
};

// Names and values, in the order of the manifest's words.
using Constants = std::vector<std::pair<const char*, std::string>>;

struct Plan {
  Constants constants;  // what the kernel is compiled for
  std::vector<int64_t> sizes;
  std::vector<Shape> outputs;
  std::array<Axis, 3> grid;
};

std::string number(int64_t value) { return std::to_string(value); }

// The digits that tell float32 numbers apart, as kernels/cubins.py writes them.
std::string number(float value) {
  char digits[32];
  std::snprintf(digits, sizeof digits, "%.9g", static_cast<double>(value));
  return digits;
}

// One bias for all rows, or one for each.
bool by_row(const Inputs& in, size_t i, const Shape& outputs) {
  const bool rows = in.rows(i).size() > 1;
  in.require(i, rows ? outputs : Shape{outputs.back()});
  return rows;
}

Plan concat_project(const Inputs& in, const Attributes&) {
  enum { x, c, weight, h };
  const Shape &tokens = in.rows(x), &columns = in.of_rank(weight, 2, 2);
  const int64_t X = tokens.back(), C = in.rows(c).back(), OUT = columns[0], K = columns[1];
  in.require(c, with_last(tokens, C));
  if (K < X + C) throw Error("weight " + text(columns) + " has fewer columns than x and c: " + number(X + C));
  const Shape y = with_last(tokens, OUT);
  const bool h_rows = by_row(in, h, y);
  const int64_t rows = product(with_last(tokens, 1));
  return {{{"X", number(X)},
           {"C", number(C)},
           {"K", number(K)},
           {"OUT", number(OUT)},
           {"H_ROWS", number(int64_t{h_rows})}},
          {rows},
          {y},
          {Axis{{rows}, "BLOCK_M"}, Axis{{OUT}, "BLOCK_O"}, Axis{}}};
}

Plan qkv_norm_rope(const Inputs& in, const Attributes& attributes) {
  enum { x, c, wq, wk, wv, hq, hk, hv, norm_q, norm_k, cos, sin };
  const Shape& tokens = in.of_rank(x, 3, 3);
  const int64_t B = tokens[0], N = tokens[1], X = tokens[2], C = in.given(c) ? in.rows(c).back() : 0;
  const int64_t OUT = in.of_rank(wq, 2, 2)[0], HEADS = attributes.heads;
  if (HEADS < 1 || OUT % HEADS) {
    throw Error("wq has " + number(OUT) + " rows, which " + number(HEADS) + " heads do not share");
  }
  const int64_t D = OUT / HEADS;
  in.require(c, {B, N, C});
  for (size_t w : {wq, wk, wv}) in.require(w, {OUT, X + C});
  bool h_rows = false;
  if (in.given(hq)) {
    h_rows = by_row(in, hq, {B, N, OUT});
    for (size_t h : {hk, hv}) in.require(h, h_rows ? Shape{B, N, OUT} : Shape{OUT});
  }
  for (size_t norm : {norm_q, norm_k}) in.require(norm, {D});
  int64_t prefix = 0;
  if (in.given(cos)) {
    const int64_t turned = in.of_rank(cos, 2, 2)[0];
    if (turned > N) throw Error("cos turns " + number(turned) + " tokens, x has " + number(N));
    for (size_t table : {cos, sin}) in.require(table, {turned, D / 2});
    prefix = N - turned;
  }
  const Shape heads{B, HEADS, N, D};
  return {{{"X", number(X)},
           {"C", number(C)},
           {"HEADS", number(HEADS)},
           {"D", number(D)},
           {"EPSILON", number(attributes.epsilon)},
           {"INTERLEAVED", number(int64_t{attributes.interleaved != 0})},
           {"H_ROWS", number(int64_t{h_rows})}},
          {B * N, N, prefix},
          {heads, heads, heads},
          {Axis{{B * N}, "BLOCK_M"}, Axis{{OUT, OUT, OUT}, "BLOCK_O"}, Axis{}}};
}

Plan joint_attention(const Inputs& in, const Attributes&) {
  enum { q1, k1, v1, q2, k2, v2 };
  const Shape &first = in.of_rank(q1, 4, 4), &second = in.of_rank(q2, 4, 4);
  const int64_t B = first[0], H = first[1], T = first[2], D = first[3], N = second[2];
  in.require(q2, {B, H, N, D});
  for (size_t i : {k1, v1}) in.require(i, first);
  for (size_t i : {k2, v2}) in.require(i, second);
  if (T == 0 || N == 0) throw Error("q1 " + text(first) + ", q2 " + text(second) + ": a segment without tokens");
  return {{{"HEADS", number(H)}, {"D", number(D)}},
          {T, N},
          {{B, T, H * D}, {B, N, H * D}},
          {Axis{{T, N}, "BLOCK_M"}, Axis{{B * H}}, Axis{}}};
}

// What the codebook ops share: indices and codewords for rows [..., what a kernel reads of a row].
Plan codebook(const Inputs& in, const Shape& rows, size_t book, Constants constants) {
  const Shape& codes = in.of_rank(book, 3, 3);
  const int64_t G = codes[0], K = codes[1], D = codes[2], count = product(with_last(rows, 1));
  for (const auto& size : {std::make_pair("G", G), std::make_pair("K", K), std::make_pair("D", D)}) {
    constants.emplace_back(size.first, number(size.second));
  }
  return {std::move(constants),
          {count},
          {with_last(rows, G), with_last(rows, G * D)},
          {Axis{{count}, "BLOCK_M"}, Axis{{G}}, Axis{}}};
}

Plan codebook_nearest(const Inputs& in, const Attributes&) {
  enum { latents, book };
  const Shape &rows = in.rows(latents), &codes = in.of_rank(book, 3, 3);
  in.require(latents, with_last(rows, codes[0] * codes[2]));
  return codebook(in, rows, book, {});
}

Plan codebook_from_logits(const Inputs& in, const Attributes&) {
  enum { logits, book };
  const Shape &rows = in.rows(logits), &codes = in.of_rank(book, 3, 3);
  in.require(logits, with_last(rows, codes[0] * codes[1]));
  return codebook(in, rows, book, {});
}

Plan codebook_from_hidden(const Inputs& in, const Attributes&) {
  enum { hidden, weight, bias, book };
  const Shape &rows = in.rows(hidden), &codes = in.of_rank(book, 3, 3);
  in.require(weight, {codes[0] * codes[1], rows.back()});
  in.require(bias, {codes[0] * codes[1]});
  return codebook(in, rows, book, {{"C", number(rows.back())}});
}

// An op's face, as in its Python file.
struct Face {
  const char* name;
  std::vector<FaceInput> inputs;
  size_t outputs;
  bool indices;  // the first output is int32
  Plan (*plan)(const Inputs&, const Attributes&);
};

const std::array<Face, 6> faces{{
    {"ConcatProject", {"x", "c", "weight", "h"}, 1, false, concat_project},
    {"QkvNormRope",
     {"x", "c?", "wq", "wk", "wv", "hq?h", "hk?h", "hv?h", "norm_q?norm", "norm_k?norm", "cos?turn", "sin?turn"},
     3,
     false,
     qkv_norm_rope},
    {"JointAttention", {"q1", "k1", "v1", "q2", "k2", "v2"}, 2, false, joint_attention},
    {"CodebookNearest", {"latents", "codebook"}, 2, true, codebook_nearest},
    {"CodebookFromLogits", {"logits", "codebook"}, 2, true, codebook_from_logits},
    {"CodebookFromHidden", {"hidden", "weight", "bias?", "codebook"}, 2, true, codebook_from_hidden},
}};

const char* type_name(ONNXTensorElementDataType type) {
  switch (type) {
    case ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT:
      return "float32";
    case ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT16:
      return "float16";
    default:
      return "bfloat16";  // faces take no other
  }
}

class Kernel {
 public:
  Kernel(const Face& face, const Form& form, const OrtKernelInfo* description) : face_(face), form_(form) {
    if (face.plan != qkv_norm_rope) return;
    const Ort::ConstKernelInfo info(description);
    attributes_ = {info.GetAttribute<int64_t>("heads"), info.GetAttribute<int64_t>("interleaved"),
                   info.GetAttribute<float>("epsilon")};
  }

  OrtStatusPtr ComputeV2(OrtKernelContext* context) {
    try {
      compute(Ort::KernelContext(context));
      return nullptr;
    } catch (const std::exception& error) {
      return Ort::Status(error).release();
    }
  }

 private:
  void compute(const Ort::KernelContext& context) const {
    std::vector<std::unique_ptr<Shape>> shapes(face_.inputs.size());
    std::vector<const char*> kinds(face_.inputs.size(), "-");
    std::vector<const void*> pointers;
    for (size_t i = 0; i < form_.taken.size(); ++i) {
      const Ort::ConstValue value = context.GetInput(i);
      const auto described = value.GetTensorTypeAndShapeInfo();
      kinds[form_.taken[i]] = type_name(described.GetElementType());
      shapes[form_.taken[i]] = std::make_unique<Shape>(described.GetShape());
      pointers.push_back(value.GetTensorRawData());
    }
    std::string types;
    for (const char* kind : kinds) types += (types.empty() ? "" : ",") + std::string(kind);
    const Plan plan = planned(Inputs(face_.inputs, std::move(shapes)));
    std::vector<void*> results;
    bool empty = true;
    for (size_t i = 0; i < plan.outputs.size(); ++i) {
      results.push_back(context.GetOutput(i, plan.outputs[i]).GetTensorMutableRawData());
      empty = empty && product(plan.outputs[i]) == 0;
    }
    if (empty) return;
    std::vector<const void*> all(pointers);
    all.insert(all.end(), results.begin(), results.end());
    for (const void* pointer : all) {
      // kernels load and store 16 bytes at once
      const bool aligned = reinterpret_cast<uintptr_t>(pointer) % 16 == 0;
      if (!aligned) throw Error(said("a tensor does not begin at a multiple of 16 bytes"));
    }
    tilewright::Cubins& cubins = tilewright::Cubins::here();
    const auto stream = static_cast<CUstream>(context.GetGPUComputeStream());
    const tilewright::OnDevice device(cubins.driver(), stream);
    std::string words = "op=" + std::string(face_.name) + " arch=" + std::to_string(device.arch()) + " inputs=" + types;
    for (const auto& [name, value] : plan.constants) words += " " + std::string(name) + "=" + value;
    const tilewright::Cubin& cubin = cubins.find(words);
    std::vector<int32_t> sizes;
    for (int64_t size : plan.sizes) {
      if (size > std::numeric_limits<int32_t>::max()) throw Error(said(std::to_string(size) + " rows are too many"));
      sizes.push_back(static_cast<int32_t>(size));
    }
    const std::array<int64_t, 3> grid{plan.grid[0].programs(cubin), plan.grid[1].programs(cubin),
                                      plan.grid[2].programs(cubin)};
    cubins.launch(cubin, device, stream, grid, pointers, sizes, results);
  }

  Plan planned(const Inputs& inputs) const {
    try {
      return face_.plan(inputs, attributes_);
    } catch (const Error& error) {
      throw Error(said(error.what()));
    }
  }

  std::string said(const std::string& what) const { return "tilewright::" + std::string(face_.name) + ": " + what; }

  const Face& face_;
  const Form& form_;
  Attributes attributes_;
};

// A form of an op for one element type; ONNX Runtime takes several of one name.
class Op : public Ort::CustomOpBase<Op, Kernel, true> {
 public:
  Op(const Face& face, Form form, ONNXTensorElementDataType type, ONNXTensorElementDataType tables)
      : face_(face), form_(std::move(form)), type_(type), tables_(tables) {}

  OrtStatusPtr CreateKernelV2(const OrtApi&, const OrtKernelInfo* info, void** kernel) const {
    try {
      *kernel = new Kernel(face_, form_, info);
      return nullptr;
    } catch (const std::exception& error) {
      return Ort::Status(error).release();
    }
  }

  const char* GetName() const { return form_.name.c_str(); }
  const char* GetExecutionProviderType() const { return provider; }
  size_t GetInputTypeCount() const { return form_.taken.size(); }
  ONNXTensorElementDataType GetInputType(size_t i) const { return is_table(form_.taken[i]) ? tables_ : type_; }
  size_t GetOutputTypeCount() const { return face_.outputs; }
  ONNXTensorElementDataType GetOutputType(size_t i) const {
    return i == 0 && face_.indices ? ONNX_TENSOR_ELEMENT_DATA_TYPE_INT32 : type_;
  }

 private:
  bool is_table(size_t i) const { return face_.plan == qkv_norm_rope && i >= face_.inputs.size() - 2; }

  const Face& face_;
  const Form form_;
  const ONNXTensorElementDataType type_, tables_;  // tables of rotations may be float32
};

Ort::CustomOpDomain domain_of_ops() {
  static std::vector<std::unique_ptr<Op>> ops;
  constexpr auto wide = ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT;
  for (const Face& face : faces) {
    for (const Form& form : tilewright::forms_of(face.name, face.inputs)) {
      const bool tables = face.plan == qkv_norm_rope && form.taken.back() + 1 == face.inputs.size();
      for (const auto type : {wide, ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT16, ONNX_TENSOR_ELEMENT_DATA_TYPE_BFLOAT16}) {
        ops.push_back(std::make_unique<Op>(face, form, type, type));
        if (tables && type != wide) ops.push_back(std::make_unique<Op>(face, form, type, wide));
      }
    }
  }
  Ort::CustomOpDomain domain("tilewright");
  for (const auto& op : ops) domain.Add(op.get());
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
  try {
    static const Ort::CustomOpDomain domain = domain_of_ops();  // sessions refer to it for as long as they live
    Ort::ThrowOnError(api->AddCustomOpDomain(options, domain));
    return nullptr;
  } catch (const std::exception& error) {
    return Ort::Status(error).release();
  }
}
