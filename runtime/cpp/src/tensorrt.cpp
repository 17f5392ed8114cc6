// TensorRT on an NVIDIA GPU, 10.16 and newer. Plans hold no weights; they are set from the mapped files. As
// runtime/engines/tensorrt.py, without its recordings. Compiled and run with an imitation of TensorRT only, never on a GPU.
#include <NvInferRuntime.h>

#include <algorithm>
#include <list>
#include <mutex>

#include "engine.hpp"
#include "explained.hpp"
#include "gpu.hpp"

namespace tw {
namespace {

using nvinfer1::DataType;
using nvinfer1::Dims;

constexpr std::size_t MOST_SHAPES = 4;  // of which an engine keeps buffers
constexpr std::size_t LEAST_SCRATCH = 256;
const std::string AGAIN = "make it again with 'tilewright export compile BUNDLE --target tensorrt'";

const std::map<std::string, DataType> TYPES = {{"float32", DataType::kFLOAT}, {"float16", DataType::kHALF}, {"bfloat16", DataType::kBF16},
                                               {"float8_e4m3fn", DataType::kFP8}, {"int64", DataType::kINT64}, {"int32", DataType::kINT32},
                                               {"int8", DataType::kINT8}, {"bool", DataType::kBOOL}};

std::string name_of(DataType type) {
    for (const auto& [name, its] : TYPES)
        if (its == type) return name;
    return "of a type that no program holds";
}

const std::vector<Reason> REASONS = {
    {{"out of memory", "outofmemory", "memory allocation", "cuda failure: 2"}, resource, MEMORY},
    {{"version tag", "incompatible device", "different device", "different compute"}, environment, AGAIN},
    {{"plugin"}, environment, "a plugin of the plan is not known here; " + AGAIN},
    {{"serialization", "magic", "corrupt"}, damaged, "the plan is damaged; " + AGAIN}};

// Keeps the last error.
class Logger : public nvinfer1::ILogger {
   public:
    void log(Severity severity, const char* text) noexcept override {
        if (severity > Severity::kERROR) return;
        std::lock_guard guard(lock_);
        told_ = text;
    }
    std::string told() {
        std::lock_guard guard(lock_);
        return told_.empty() ? "without a message" : told_;
    }

   private:
    std::mutex lock_;
    std::string told_;
};

Logger& logger() {
    static auto* logger = new Logger;  // never freed: TensorRT's objects use it to their end
    return *logger;
}

Error explained(const Path& plan, const std::string& what) { return explained(REASONS, plan, "tensorrt " + tensorrt_version(), what, logger().told()); }

Error refused(const Path& plan, const std::string& what) { return {damaged, one_line(plan.string() + ": " + what + "; " + AGAIN, 800)}; }

Shape shape_of(const Dims& dims) { return {dims.d, dims.d + std::max(0, dims.nbDims)}; }

Dims dims_of(const Shape& shape) {
    Dims dims{};
    dims.nbDims = static_cast<std::int32_t>(shape.size());
    std::copy(shape.begin(), shape.end(), dims.d);
    return dims;
}

bool within(const Shape& shape, const Shape& least, const Shape& most) {
    bool fits = shape.size() == least.size() && shape.size() == most.size();
    for (std::size_t i = 0; fits && i < shape.size(); ++i) fits = least[i] <= shape[i] && shape[i] <= most[i];
    return fits;
}

// Sets every weight of an engine from its file.
void refit(nvinfer1::ICudaEngine& engine, const EngineFiles& files, Gpu& gpu) {
    const Path& plan = files.graph();
    std::unique_ptr<nvinfer1::IRefitter> refitter(nvinfer1::createInferRefitter(engine, logger()));
    if (!refitter) throw explained(plan, "takes no weights");
    std::vector<const char*> names(static_cast<std::size_t>(refitter->getAllWeights(0, nullptr)));
    if (names.empty()) return;
    refitter->getAllWeights(static_cast<std::int32_t>(names.size()), names.data());
    Named<std::shared_ptr<Mapped>> maps;  // which must stay until the refit has ended
    for (const std::string name : names) {
        nvinfer1::Weights weights = refitter->getWeightsPrototype(name.c_str());
        auto found = files.references.find(name);
        if (found == files.references.end()) throw refused(plan, "reads a weight " + repr(name) + " that weights.json does not list");
        const Reference& reference = found->second;
        auto type = TYPES.find(reference.dtype);
        if (type == TYPES.end() || type->second != weights.type || product(reference.shape) != weights.count)
            throw refused(plan, repr(name) + " is " + reference.dtype + " " + repr(reference.shape) + ", and not " + std::to_string(weights.count) + " numbers of " +
                                    name_of(weights.type));
        auto& map = maps[files.weights.at(reference.location()).string()];
        if (!map) map = std::make_shared<Mapped>(files.weights.at(reference.location()));
        weights.values = map->data() + reference.offset;
        if (!refitter->setNamedWeights(name.c_str(), weights)) throw refused(plan, "TensorRT does not take weight " + repr(name));
    }
    const char* first = nullptr;
    if (std::int32_t missing = refitter->getMissingWeights(1, &first); missing > 0)
        throw refused(plan, std::to_string(missing) + " weights got no values, the first is " + repr(std::string(first ? first : "")));
    if (!refitter->refitCudaEngineAsync(static_cast<cudaStream_t>(gpu.stream()))) throw refused(plan, "TensorRT refuses the weights");
    gpu.wait();
}

class TensorrtEngine : public Engine {
   public:
    TensorrtEngine(std::unique_ptr<nvinfer1::IRuntime> runtime, std::unique_ptr<nvinfer1::ICudaEngine> engine, Path plan, Gpu& gpu)
        : gpu_(gpu), runtime_(std::move(runtime)), engine_(std::move(engine)), plan_(std::move(plan)) {
        for (std::int32_t i = 0; i < engine_->getNbIOTensors(); ++i) {
            const char* name = engine_->getIOTensorName(i);
            auto& side = engine_->getTensorIOMode(name) == nvinfer1::TensorIOMode::kINPUT ? inputs_ : outputs_;
            side[name] = name_of(engine_->getTensorDataType(name));
        }
        results_ = key_set(outputs_);
    }
    ~TensorrtEngine() override {
        Gpu::Use use(gpu_);
        kept_.clear();
        engine_.reset();
        runtime_.reset();
    }

    Named<Tensor> run(const Named<Tensor>& inputs, const Strings& outputs) override {
        require_own(plan_, inputs_, results_, inputs, outputs);
        Gpu::Use use(gpu_);
        Prepared& prepared = prepared_for(inputs);
        for (const auto& [name, tensor] : inputs) gpu_.fill(prepared.buffers.at(name)->address(), tensor.data.get(), tensor.bytes());
        // the values inside of calls; every engine of the GPU uses the same memory in turn
        void* scratch = gpu_.scratch(std::max(prepared.scratch, LEAST_SCRATCH));
        prepared.context->setDeviceMemoryV2(scratch, static_cast<std::int64_t>(prepared.scratch));
        if (!prepared.context->enqueueV3(static_cast<cudaStream_t>(gpu_.stream()))) throw explained(plan_, "failed");
        Named<Tensor> tensors;
        for (const auto& name : outputs) {
            const Gpu::Block& block = *prepared.buffers.at(name);
            auto bytes = std::make_shared<std::vector<unsigned char>>(block.bytes());
            gpu_.read(bytes->data(), block.address(), bytes->size());
            tensors[name] = {outputs_.at(name), prepared.shapes.at(name), std::shared_ptr<const void>(bytes, bytes->data())};
        }
        gpu_.wait();
        return tensors;
    }

   private:
    struct Prepared {  // for inputs of certain shapes
        std::vector<Shape> key;
        std::unique_ptr<nvinfer1::IExecutionContext> context;
        Named<Shape> shapes;                           // of outputs
        Named<std::unique_ptr<Gpu::Block>> buffers;    // of inputs and outputs
        std::size_t scratch = 0;
    };

    Gpu& gpu_;
    std::unique_ptr<nvinfer1::IRuntime> runtime_;
    std::unique_ptr<nvinfer1::ICudaEngine> engine_;
    Path plan_;
    Named<std::string> inputs_, outputs_;  // name -> type
    std::set<std::string> results_;        // names of outputs
    std::list<Prepared> kept_;             // the one that was used last comes first

    Prepared& prepared_for(const Named<Tensor>& inputs) {
        std::vector<Shape> key;
        for (const auto& [name, tensor] : inputs) key.push_back(tensor.shape);
        auto found = std::find_if(kept_.begin(), kept_.end(), [&](const Prepared& prepared) { return prepared.key == key; });
        if (found == kept_.end()) {
            kept_.push_front(prepared(inputs));
            kept_.front().key = key;
        } else {
            kept_.splice(kept_.begin(), kept_, found);
        }
        if (kept_.size() > MOST_SHAPES) kept_.pop_back();
        return kept_.front();
    }

    Prepared prepared(const Named<Tensor>& inputs) {
        Prepared made;
        made.context.reset(engine_->createExecutionContext(nvinfer1::ExecutionContextAllocationStrategy::kUSER_MANAGED));
        if (!made.context || !made.context->setOptimizationProfileAsync(profile(inputs), static_cast<cudaStream_t>(gpu_.stream())))
            throw explained(plan_, "makes no context");
        for (const auto& [name, tensor] : inputs)
            if (!made.context->setInputShape(name.c_str(), dims_of(tensor.shape))) throw explained(plan_, "refuses the shapes");
        const char* lacking = nullptr;
        if (made.context->inferShapes(1, &lacking) != 0) throw refused(plan_, "the shape of " + repr(std::string(lacking ? lacking : "")) + " does not follow from the inputs");
        for (const auto& [name, type] : outputs_) made.shapes[name] = shape_of(made.context->getTensorShape(name.c_str()));
        auto take = [&](const std::string& name, std::size_t bytes) {
            auto& block = made.buffers[name] = std::make_unique<Gpu::Block>(gpu_, bytes);
            if (!made.context->setTensorAddress(name.c_str(), block->address())) throw explained(plan_, "refuses the memory of " + repr(name));
        };
        for (const auto& [name, tensor] : inputs) take(name, tensor.bytes());
        for (const auto& [name, type] : outputs_) take(name, static_cast<std::size_t>(product(made.shapes[name])) * width_of(type));
        made.scratch = made.context->updateDeviceMemorySizeForShapes();
        return made;
    }

    // The first profile that takes the shapes of these inputs.
    std::int32_t profile(const Named<Tensor>& inputs) const {
        using Selector = nvinfer1::OptProfileSelector;
        Strings misfits;
        std::string misfit;
        for (std::int32_t number = 0; number < engine_->getNbOptimizationProfiles(); ++number) {
            bool fits = true;
            for (const auto& [name, tensor] : inputs) {
                Shape least = shape_of(engine_->getProfileShape(name.c_str(), number, Selector::kMIN));
                Shape most = shape_of(engine_->getProfileShape(name.c_str(), number, Selector::kMAX));
                if (within(tensor.shape, least, most)) continue;
                misfits.push_back(name + " of " + repr(least) + " to " + repr(most));
                misfit = name + " of shape " + repr(tensor.shape);
                fits = false;
                break;
            }
            if (fits) return number;
        }
        throw Error(usage, plan_.string() + ": " + misfit + " is in no profile of the plan, which takes " + join(misfits, " or ") +
                               "; use the bundle's own tile and batch, or compile with another --tile");
    }
};

}  // namespace

std::string tensorrt_version() {
    auto text = [](std::int32_t number) { return std::to_string(number); };
    return join({text(getInferLibMajorVersion()), text(getInferLibMinorVersion()), text(getInferLibPatchVersion()), text(getInferLibBuildVersion())}, ".");
}

std::unique_ptr<Engine> open_tensorrt(const EngineFiles& files, const std::string&, const EngineOptions& options) {
    const Path& plan = files.graph();
    Gpu& gpu = Gpu::first();
    Gpu::Use use(gpu);
    const std::string data = bytes_of(plan);
    std::unique_ptr<nvinfer1::IRuntime> runtime(nvinfer1::createInferRuntime(logger()));
    std::unique_ptr<nvinfer1::ICudaEngine> engine(runtime ? runtime->deserializeCudaEngine(data.data(), data.size()) : nullptr);
    if (!engine) throw explained(plan, "refuses the plan");
    if (options.low_memory && engine->getStreamableWeightsSize() > 0) engine->setWeightStreamingBudgetV2(engine->getWeightStreamingAutomaticBudget());
    refit(*engine, files, gpu);
    return std::make_unique<TensorrtEngine>(std::move(runtime), std::move(engine), plan, gpu);
}

}  // namespace tw
