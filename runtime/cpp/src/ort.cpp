// ONNX Runtime on the CPU, with our own kernels where there are any, and on an NVIDIA GPU. As runtime/engines/ort.py.
#include <dlfcn.h>
#include <onnxruntime_cxx_api.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <mutex>

#include "arena.hpp"
#include "engine.hpp"
#include "explained.hpp"

namespace tw {
namespace {

const std::map<std::string, ONNXTensorElementDataType> ELEMENTS = {
    {"float32", ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT},   {"float64", ONNX_TENSOR_ELEMENT_DATA_TYPE_DOUBLE},
    {"float16", ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT16}, {"bfloat16", ONNX_TENSOR_ELEMENT_DATA_TYPE_BFLOAT16},
    {"int64", ONNX_TENSOR_ELEMENT_DATA_TYPE_INT64},     {"int32", ONNX_TENSOR_ELEMENT_DATA_TYPE_INT32},
    {"int16", ONNX_TENSOR_ELEMENT_DATA_TYPE_INT16},     {"int8", ONNX_TENSOR_ELEMENT_DATA_TYPE_INT8},
    {"uint8", ONNX_TENSOR_ELEMENT_DATA_TYPE_UINT8},     {"bool", ONNX_TENSOR_ELEMENT_DATA_TYPE_BOOL}};

const std::vector<Reason> REASONS = {
    {{"allocate", "bad_alloc", "out of memory", "size overflowed", "exceeds the supported maximum of"}, resource, MEMORY},
    {{"failed to load library"}, environment, "ONNX Runtime needs libraries of CUDA that are not found: put their folders into LD_LIBRARY_PATH"},
    {{"cuda failure", "cudnn failure", "cublas failure"}, environment, "the GPU refuses: see nvidia-smi, and which CUDA this ONNX Runtime needs"},
    {{"invalid dimensions for input", "invalid rank for input"}, usage, OTHER_SIZE},
    {{"unexpected input data type", "required inputs", "invalid input name", "invalid output name"}, damaged, OTHER_GRAPH},
    {{"unsupported model ir version", "under development", "could not find an implementation"}, environment,
     "this version of ONNX Runtime is too old for the graph: use a newer one"},
    {{"not a registered function/op", "no op registered"}, environment, "the graph needs our kernels: run make native, or name their library"},
    {{"protobuf", "invalid graph", "invalid model", "type error"}, damaged, DAMAGED},
    {{"external data", "external initializer", "no such file", "out of bounds"}, damaged,
     "a file is damaged or has moved: name the folder of the weights, or rebuild the bundle"},
    {{"out of data bounds"}, usage, "a number among the inputs is no index of the network: give ids of this bundle's own tokenizers"},
    {{"while running"}, usage, OTHER_SIZE}};

// A message without codes, and without places in ONNX Runtime's code.
std::string telling(std::string text) {
    auto cut = [&text](const std::string& from, const std::string& to, int times) {  // from a word to the end of another
        std::size_t begin = text.find(from), end = begin;
        for (int i = 0; i < times && end != std::string::npos; ++i)
            if ((end = text.find(to, end)) != std::string::npos) end += to.size();
        if (end != std::string::npos) text.erase(begin, end - begin);
    };
    cut("/onnxruntime_src/", ") ", 1);
    cut("[ONNXRuntimeError]", " : ", 3);
    text.erase(text.find_last_not_of(" \n") + 1);
    return text;
}

Error explained(const Path& graph, const std::string& what, const std::string& message) {
    return explained(REASONS, graph, "onnxruntime " + ort_version(), what, telling(message));
}

class OrtEngine : public Engine {
   public:
    OrtEngine(Ort::Session session, Path graph) : session_(std::move(session)), graph_(std::move(graph)) {}
    ~OrtEngine() override {
        session_ = Ort::Session(nullptr);
        give_back();
    }

    Named<Tensor> run(const Named<Tensor>& inputs, const Strings& outputs) override {
        try {
            Ort::MemoryInfo place = Ort::MemoryInfo::CreateCpu(OrtArenaAllocator, OrtMemTypeDefault);
            std::vector<const char*> input_names, output_names;
            std::vector<Ort::Value> values;
            for (const auto& [name, tensor] : inputs) {
                input_names.push_back(name.c_str());
                // ONNX Runtime takes inputs as mutable and does not change them
                values.push_back(Ort::Value::CreateTensor(place, const_cast<void*>(tensor.data.get()), tensor.bytes(), tensor.shape.data(),
                                                          tensor.shape.size(), ELEMENTS.at(tensor.dtype)));
            }
            for (const auto& name : outputs) output_names.push_back(name.c_str());
            Ending ending{*this, std::make_shared<Ort::RunOptions>()};
            auto results = session_.Run(*ending.options, input_names.data(), values.data(), values.size(), output_names.data(), outputs.size());
            Named<Tensor> tensors;
            for (std::size_t i = 0; i < outputs.size(); ++i) {
                auto facts = results[i].GetTensorTypeAndShapeInfo();
                std::string dtype;
                for (const auto& [name, element] : ELEMENTS)
                    if (element == facts.GetElementType()) dtype = name;
                if (dtype.empty()) throw Error(damaged, graph_.string() + ": output " + repr(outputs[i]) + " has a type that no program holds");
                // a value lies in the arena, and as long as it is kept, its block of the arena stays in pieces
                tensors[outputs[i]] = tensor_of(dtype, facts.GetShape(), results[i].GetTensorRawData());
            }
            return tensors;
        } catch (const Ort::Exception& error) {
            throw explained(graph_, "failed", error.what());
        }
    }

    void stop(std::thread::id thread) override {
        std::lock_guard guard(lock_);
        if (auto options = running_.find(thread); options != running_.end()) options->second->SetTerminate();
    }

   private:
    Ort::Session session_;
    Path graph_;
    std::mutex lock_;
    std::map<std::thread::id, std::shared_ptr<Ort::RunOptions>> running_;  // the options of a thread's call

    struct Ending {  // forgets a call, however it ends
        OrtEngine& engine;
        std::shared_ptr<Ort::RunOptions> options;

        Ending(OrtEngine& its_engine, std::shared_ptr<Ort::RunOptions> its_options) : engine(its_engine), options(std::move(its_options)) {
            std::lock_guard guard(engine.lock_);
            engine.running_[std::this_thread::get_id()] = options;
        }
        ~Ending() {
            std::lock_guard guard(engine.lock_);
            engine.running_.erase(std::this_thread::get_id());
        }
    };
};

// A session over the mapped files of the weights.
Ort::Session session_of(const EngineFiles& files, Ort::SessionOptions& options) {
    const Path& graph = files.graph();
    std::string model = bytes_of(graph);
    options.SetLogSeverityLevel(ORT_LOGGING_LEVEL_FATAL);
    options.AddConfigEntry("session.load_model_format", "ONNX");  // for any suffix of the file
    if (!files.weights.empty()) {
        // ONNX Runtime maps no file behind a link, so the graph gets real paths below one folder
        Named<std::string> locations;
        Named<Path> real;
        std::optional<Path> folder;
        for (const auto& [name, external] : external_data(model, graph.string())) {
            Path file = std::filesystem::canonical(files.weights.at(external.location));
            real[name] = file;
            Path common, parent = file.parent_path();
            if (folder) {
                auto ends = std::mismatch(folder->begin(), folder->end(), parent.begin(), parent.end());
                for (auto part = folder->begin(); part != ends.first; ++part) common /= *part;
            }
            folder = folder ? common : parent;
        }
        for (const auto& [name, file] : real) locations[name] = file.lexically_relative(*folder).generic_string();
        model = relocated(model, locations, graph.string());
        if (folder) options.AddConfigEntry("session.model_external_initializers_file_folder_path", folder->c_str());
    }
    return {environment_of_process(), model.data(), model.size(), options};
}

}  // namespace

std::optional<Path> native_library() {
    if (const char* named = std::getenv("TILEWRIGHT_NATIVE")) return *named ? std::optional<Path>(named) : std::nullopt;
    Dl_info here{};
    std::error_code error;
    if (!dladdr(reinterpret_cast<void*>(&native_library), &here) || !here.dli_fname) return std::nullopt;
    const Path folder = std::filesystem::absolute(here.dli_fname, error).parent_path();
    for (const char* place : {"libtilewright_cpu.so", "../../kernels/native/lib/libtilewright_cpu.so"})  // installed; in a clone
        if (Path file = folder / place; std::filesystem::is_regular_file(file, error)) return file;
    return std::nullopt;
}

std::string ort_version() { return OrtGetApiBase()->GetVersionString(); }

bool ort_has_cuda() {
    const Strings providers = Ort::GetAvailableProviders();
    return std::find(providers.begin(), providers.end(), "CUDAExecutionProvider") != providers.end();
}

std::unique_ptr<Engine> open_ort(const EngineFiles& files, const std::string& precision, const EngineOptions& choice) {
    try {
        Ort::SessionOptions options;
        options.SetIntraOpNumThreads(choice.threads);
        take_shared(options);
        // a pattern is one block for all values of a call, beside the blocks of the first call: twice the memory, same speed
        options.DisableMemPattern();
        // each component has its own threads, which must not occupy cores while another component runs
        options.AddConfigEntry("session.force_spinning_stop", "1");
        if (precision == "fp8") options.AddConfigEntry("session.disable_quant_qdq", "1");
        if (choice.native && precision == "float32") options.RegisterCustomOpsLibrary(choice.native->c_str());
        Strings disabled;
        if (choice.low_memory) {  // folding and pre-packing would each copy the mapped weights
            options.AddConfigEntry("session.disable_prepacking", "1");
            disabled = {"ConstantFolding", "FuseFp16InitializerToFp32NodeTransformer"};
        }
        if (precision == "int8") disabled.emplace_back("MatMulAddFusion");
        if (!disabled.empty()) options.AddConfigEntry("optimization.disable_specified_optimizers", join(disabled, ";").c_str());
        auto engine = std::make_unique<OrtEngine>(session_of(files, options), files.graph());
        give_back();  // re-packing leaves a fifth of the weights' size in free blocks
        return engine;
    } catch (const Ort::Exception& error) {
        throw explained(files.graph(), "refuses the graph", error.what());
    }
}

// It has never run on a GPU. As runtime/engines/cuda.py, without its recordings and without values that stay on the GPU.
std::unique_ptr<Engine> open_cuda(const EngineFiles& files, const std::string&, const EngineOptions&) {
    // powers of two would waste a third of the memory; a search for each new size of a tile would take seconds;
    // float32 has its 24 bits, as the accuracy gate asks
    const std::map<const char*, const char*> settings = {
        {"device_id", "0"}, {"arena_extend_strategy", "kSameAsRequested"}, {"cudnn_conv_algo_search", "HEURISTIC"}, {"use_tf32", "0"}};
    std::vector<const char*> keys, values;
    for (const auto& [key, value] : settings) keys.push_back(key), values.push_back(value);
    try {
        environment_of_process();  // its logger must be there before a provider is asked for
        OrtCUDAProviderOptionsV2* made = nullptr;
        Ort::ThrowOnError(Ort::GetApi().CreateCUDAProviderOptions(&made));
        std::unique_ptr<OrtCUDAProviderOptionsV2, decltype(OrtApi::ReleaseCUDAProviderOptions)> provider(made, Ort::GetApi().ReleaseCUDAProviderOptions);
        Ort::ThrowOnError(Ort::GetApi().UpdateCUDAProviderOptions(provider.get(), keys.data(), values.data(), keys.size()));
        Ort::SessionOptions options;
        options.AppendExecutionProvider_CUDA_V2(*provider);
        return std::make_unique<OrtEngine>(session_of(files, options), files.graph());
    } catch (const Ort::Exception& error) {
        throw explained(files.graph(), "refuses the graph", error.what());
    }
}

}  // namespace tw
