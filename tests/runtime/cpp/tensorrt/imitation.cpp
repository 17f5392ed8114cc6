// TensorRT for a machine without one. It knows one network, the filter of tests/support/bundles.py: each colour is padded by
// reflection, filtered by its own 3x3 numbers, and cut to 0..1. A plan is a line: "imitation", and words for what shall fail.
// The memory of the GPU is the host's, as the driver of tests has it.
#include <NvInferRuntime.h>

#include <algorithm>
#include <cstring>
#include <map>
#include <sstream>
#include <string>
#include <vector>

using namespace nvinfer1;

namespace {

constexpr std::int64_t LEAST = 8, MOST = 96, MANY = 4, WEIGHTS = 27;
constexpr std::size_t SCRATCH = 1000;

struct Plan {
    ILogger& logger;
    std::string words;
    std::vector<float> kernels;

    bool has(const char* word) const { return words.find(word) != std::string::npos; }
    void fail(const char* text) const { logger.log(ILogger::Severity::kERROR, text); }
};

bool is(const char* name, const char* other) { return !std::strcmp(name, other); }

class Context : public IExecutionContext {
   public:
    explicit Context(const Plan& plan) : plan_(plan) {}
    bool setOptimizationProfileAsync(std::int32_t number, cudaStream_t stream) noexcept override { return stream && number == 0; }
    bool setInputShape(char const* name, Dims const& dims) noexcept override {
        dims_ = dims;
        return is(name, "image") && dims.nbDims == 4;
    }
    std::int32_t inferShapes(std::int32_t, char const**) noexcept override { return 0; }
    Dims getTensorShape(char const*) const noexcept override { return dims_; }
    bool setTensorAddress(char const* name, void* data) noexcept override {
        addresses_[name] = static_cast<float*>(data);
        return data;
    }
    std::size_t updateDeviceMemorySizeForShapes() noexcept override { return SCRATCH; }
    void setDeviceMemoryV2(void* memory, std::int64_t size) noexcept override { ready_ = memory && size == static_cast<std::int64_t>(SCRATCH); }
    bool enqueueV3(cudaStream_t stream) noexcept override {
        if (plan_.has("memory")) return plan_.fail("IExecutionContext::enqueueV3: Cuda failure: 2: out of memory"), false;
        if (!stream || !ready_ || plan_.kernels.empty()) return plan_.fail("not ready"), false;
        std::int64_t height = dims_.d[2], width = dims_.d[3];
        auto reflected = [](std::int64_t at, std::int64_t side) { return at < 0 ? -at : at >= side ? 2 * side - 2 - at : at; };
        for (std::int64_t plane = 0; plane < dims_.d[0] * 3; ++plane) {
            const float* from = addresses_.at("image") + plane * height * width;
            float* to = addresses_.at("sharp") + plane * height * width;
            for (std::int64_t y = 0; y < height; ++y)
                for (std::int64_t x = 0; x < width; ++x) {
                    float sum = 0;
                    for (int k = 0; k < 9; ++k)
                        sum += plan_.kernels[plane % 3 * 9 + k] * from[reflected(y + k / 3 - 1, height) * width + reflected(x + k % 3 - 1, width)];
                    to[y * width + x] = std::min(1.0F, std::max(0.0F, sum));
                }
        }
        return true;
    }

   private:
    const Plan& plan_;
    Dims dims_{};
    std::map<std::string, float*> addresses_;
    bool ready_ = false;
};

struct Engine : ICudaEngine {
    Plan plan;

    explicit Engine(Plan its) : plan(std::move(its)) {}
    std::int32_t getNbIOTensors() const noexcept override { return 2; }
    char const* getIOTensorName(std::int32_t index) const noexcept override { return index ? "sharp" : "image"; }
    TensorIOMode getTensorIOMode(char const* name) const noexcept override { return is(name, "image") ? TensorIOMode::kINPUT : TensorIOMode::kOUTPUT; }
    DataType getTensorDataType(char const*) const noexcept override { return plan.has("half") ? DataType::kHALF : DataType::kFLOAT; }
    std::int32_t getNbOptimizationProfiles() const noexcept override { return 1; }
    Dims getProfileShape(char const*, std::int32_t, OptProfileSelector select) const noexcept override {
        bool least = select == OptProfileSelector::kMIN;
        return {4, {least ? 1 : MANY, 3, least ? LEAST : MOST, least ? LEAST : MOST}};
    }
    std::int64_t getStreamableWeightsSize() const noexcept override { return WEIGHTS; }
    std::int64_t getWeightStreamingAutomaticBudget() const noexcept override { return WEIGHTS; }
    bool setWeightStreamingBudgetV2(std::int64_t budget) noexcept override { return budget == WEIGHTS; }
    IExecutionContext* createExecutionContext(ExecutionContextAllocationStrategy strategy) noexcept override {
        return strategy == ExecutionContextAllocationStrategy::kUSER_MANAGED ? new Context(plan) : nullptr;
    }
};

class Refitter : public IRefitter {
   public:
    explicit Refitter(Plan& plan) : plan_(plan) {}
    std::int32_t getAllWeights(std::int32_t size, char const** names) noexcept override {
        if (size) names[0] = plan_.has("unknown") ? "other" : "weight";
        return 1;
    }
    Weights getWeightsPrototype(char const*) const noexcept override { return {DataType::kFLOAT, nullptr, plan_.has("more") ? 2 * WEIGHTS : WEIGHTS}; }
    bool setNamedWeights(char const* name, Weights weights) noexcept override {
        weights_ = static_cast<const float*>(weights.values);
        return is(name, "weight") && weights.count == WEIGHTS;
    }
    std::int32_t getMissingWeights(std::int32_t size, char const** names) noexcept override {
        if (size && plan_.has("missing")) names[0] = "bias";
        return plan_.has("missing") ? 1 : 0;
    }
    bool refitCudaEngineAsync(cudaStream_t stream) noexcept override {
        plan_.kernels.assign(weights_, weights_ + WEIGHTS);
        return stream;
    }

   private:
    Plan& plan_;
    const float* weights_ = nullptr;
};

class Runtime : public IRuntime {
   public:
    explicit Runtime(ILogger& logger) : logger_(logger) {}
    ICudaEngine* deserializeCudaEngine(void const* blob, std::size_t size) noexcept override {
        std::string words(static_cast<const char*>(blob), size);
        if (words.rfind("imitation", 0) == 0) return new Engine({logger_, words, {}});
        logger_.log(ILogger::Severity::kWARNING, "a warning");
        logger_.log(ILogger::Severity::kERROR, "IRuntime::deserializeCudaEngine: magicTag: the serialization is corrupt");
        return nullptr;
    }

   private:
    ILogger& logger_;
};

}  // namespace

namespace nvinfer1 {
IRuntime* createInferRuntime(ILogger& logger) noexcept { return new Runtime(logger); }
IRefitter* createInferRefitter(ICudaEngine& engine, ILogger&) noexcept { return new Refitter(static_cast<Engine&>(engine).plan); }
}  // namespace nvinfer1

std::int32_t getInferLibMajorVersion() noexcept { return 10; }
std::int32_t getInferLibMinorVersion() noexcept { return 16; }
std::int32_t getInferLibPatchVersion() noexcept { return 1; }
std::int32_t getInferLibBuildVersion() noexcept { return 11; }
