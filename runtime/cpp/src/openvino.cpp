// OpenVINO on the CPU, in float32. As runtime/engines/openvino.py.
#include <openvino/op/constant.hpp>
#include <openvino/op/parameter.hpp>
#include <openvino/runtime/core.hpp>

#include <algorithm>
#include <cstring>
#include <mutex>
#include <regex>

#include "engine.hpp"
#include "explained.hpp"

namespace tw {
namespace {

const Named<ov::element::Type> ELEMENTS = {{"float32", ov::element::f32}, {"float64", ov::element::f64}, {"float16", ov::element::f16},
                                           {"bfloat16", ov::element::bf16}, {"int64", ov::element::i64}, {"int32", ov::element::i32},
                                           {"int16", ov::element::i16}, {"int8", ov::element::i8}, {"uint8", ov::element::u8},
                                           {"bool", ov::element::boolean}};

std::string name_of(const ov::element::Type& type) {
    for (const auto& [name, element] : ELEMENTS)
        if (element == type) return name;
    return type.to_string();
}

const std::vector<Reason> REASONS = {
    {{"failed to allocate", "bad_alloc", "out of memory", "memory descriptor", "memory object"}, resource, MEMORY},
    {{"no conversion rule"}, environment, "this version of OpenVINO is too old for the graph: use a newer one"},
    {{"unable to read the model", "conversion is failed", "wasn't fully converted"}, damaged, DAMAGED},
    {{"are incompatible", "node with name"}, usage, OTHER_SIZE}};

Error explained(const Path& graph, const std::string& what, const std::string& message) {
    static const std::regex noise("(Caught exception: )?Exception from src/\\S+:\\d+: ?|Check '.*?' failed at src/\\S+:\\d+: ?|FrontEnd API failed with \\w+: ?");
    std::string text = std::regex_replace(message, noise, "");
    std::replace(text.begin(), text.end(), '\n', ' ');
    return explained(REASONS, graph, "openvino " + openvino_version(), what, text);
}

ov::Core& core() {
    static ov::Core core;
    return core;
}

class OpenvinoEngine : public Engine {
   public:
    OpenvinoEngine(ov::CompiledModel compiled, std::vector<std::shared_ptr<Mapped>> maps, Path graph, bool low)
        : maps_(std::move(maps)), compiled_(std::move(compiled)), graph_(std::move(graph)), low_(low) {
        // a port also has the names of values that equal it
        for (const auto& port : compiled_.inputs()) {
            const std::string name = port.get_node()->get_friendly_name();
            inputs_[name] = port;
            types_[name] = name_of(port.get_element_type());
        }
        for (const auto& port : compiled_.outputs())
            for (const auto& name : port.get_names()) outputs_[name] = port;
        results_ = key_set(outputs_);
    }

    Named<Tensor> run(const Named<Tensor>& inputs, const Strings& outputs) override {
        require_own(graph_, types_, results_, inputs, outputs);
        auto running = begin();
        try {
            for (const auto& [name, tensor] : inputs) {
                // OpenVINO takes inputs as mutable and does not change them
                running->request.set_tensor(inputs_.at(name), ov::Tensor(ELEMENTS.at(tensor.dtype), ov::Shape(tensor.shape.begin(), tensor.shape.end()),
                                                                         const_cast<void*>(tensor.data.get())));
            }
            running->request.start_async();
            {
                std::lock_guard guard(lock_);
                if (running->stopped) running->request.cancel();  // before it began
            }
            running->request.wait();
            Named<Tensor> tensors;
            for (const auto& name : outputs) {
                ov::Tensor result = running->request.get_tensor(outputs_.at(name));
                // a copy, because the next call of the request writes over it
                const ov::Shape shape = result.get_shape();
                tensors[name] = tensor_of(name_of(result.get_element_type()), Shape(shape.begin(), shape.end()), result.data());
            }
            end(running);
            return tensors;
        } catch (const Error&) {
            end(running);
            throw;
        } catch (const std::exception& error) {
            bool stopped = running->stopped;
            end(running);
            if (stopped) throw Error(cancelled, "cancelled");
            throw explained(graph_, "failed", error.what());
        }
    }

    void stop(std::thread::id thread) override {
        std::lock_guard guard(lock_);
        auto running = running_.find(thread);
        if (running == running_.end()) return;
        running->second->stopped = true;
        running->second->request.cancel();
    }

   private:
    struct Running {
        ov::InferRequest request;
        bool stopped = false;
    };

    std::vector<std::shared_ptr<Mapped>> maps_;  // of the weights, which the model reads
    ov::CompiledModel compiled_;
    Path graph_;
    bool low_;
    Named<ov::Output<const ov::Node>> inputs_, outputs_;
    Named<std::string> types_;        // of inputs
    std::set<std::string> results_;  // names of outputs
    std::mutex lock_;
    std::vector<ov::InferRequest> free_;
    std::map<std::thread::id, std::shared_ptr<Running>> running_;

    std::shared_ptr<Running> begin() {
        std::lock_guard guard(lock_);
        auto running = std::make_shared<Running>();
        if (free_.empty()) {
            running->request = compiled_.create_infer_request();
        } else {
            running->request = free_.back();
            free_.pop_back();
        }
        return running_[std::this_thread::get_id()] = running;
    }

    void end(const std::shared_ptr<Running>& running) {
        std::lock_guard guard(lock_);
        running_.erase(std::this_thread::get_id());
        if (!low_) {
            free_.push_back(running->request);
        } else if (running_.empty()) {
            running->request = {};
            compiled_.release_memory();
        }
    }
};

// Replaces inputs of a model by constants over the mapped files; returns the maps.
std::vector<std::shared_ptr<Mapped>> attach(const std::shared_ptr<ov::Model>& model, const Named<External>& weights, const Named<Path>& files) {
    Named<std::shared_ptr<Mapped>> maps;
    for (const auto& parameter : ov::ParameterVector(model->get_parameters())) {
        for (const auto& name : parameter->output(0).get_names()) {
            auto weight = weights.find(name);
            if (weight == weights.end()) continue;
            const External& external = weight->second;
            const Path& file = files.at(external.location);
            auto& map = maps[file.string()];
            if (!map) map = std::make_shared<Mapped>(file);
            ov::Tensor tensor(ELEMENTS.at(external.dtype), ov::Shape(external.shape.begin(), external.shape.end()),
                              const_cast<unsigned char*>(map->data()) + external.offset);
            auto constant = std::make_shared<ov::op::v0::Constant>(tensor);
            parameter->output(0).replace(constant->output(0));
            model->remove_parameter(parameter);
            break;
        }
    }
    std::vector<std::shared_ptr<Mapped>> all;
    for (const auto& [name, map] : maps) all.push_back(map);
    return all;
}

}  // namespace

std::string openvino_version() {
    std::string build = ov::get_openvino_version().buildNumber;
    return build.substr(0, build.find('-'));
}

std::unique_ptr<Engine> open_openvino(const EngineFiles& files, const std::string& precision, const EngineOptions& options) {
    const Path& graph = files.graph();
    if (precision != "float32") throw Error(environment, graph.string() + ": this library runs OpenVINO in float32 only; choose an engine in float32");
    const std::string data = bytes_of(graph);
    const Named<External> weights = external_data(data, graph.string());
    try {
        auto model = core().read_model(with_inputs(data, graph.string()), ov::Tensor());
        auto maps = attach(model, weights, files.weights);
        // other components and processes use the same cores, so threads stay on none
        ov::AnyMap settings = {ov::hint::inference_precision(ov::element::f32), ov::num_streams(1), ov::inference_num_threads(options.threads),
                               ov::hint::enable_cpu_pinning(false)};
        return std::make_unique<OpenvinoEngine>(core().compile_model(model, "CPU", settings), std::move(maps), graph, options.low_memory);
    } catch (const Error&) {
        throw;
    } catch (const std::exception& error) {
        throw explained(graph, "refuses the graph", error.what());
    }
}

}  // namespace tw
