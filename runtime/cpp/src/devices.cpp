#include "devices.hpp"

#include <algorithm>

#include "gpu.hpp"
#include "machine.hpp"

namespace tw {

std::shared_ptr<Engine> OpenEngines::at(const std::string& component) {
    std::lock_guard guard(lock_);
    std::shared_ptr<Engine>& engine = engines_[component];
    if (!engine) engine = open_(component);
    return engine;
}

void OpenEngines::close(const std::set<std::string>& components) {
    std::lock_guard guard(lock_);
    for (const auto& component : components) engines_.erase(component);
}

std::set<std::string> OpenEngines::opened() const {
    std::lock_guard guard(lock_);
    std::set<std::string> names;
    for (const auto& [name, engine] : engines_)
        if (engine) names.insert(name);
    return names;
}

Named<Tensor> HostDevice::run(const std::string& component, const Named<Tensor>& inputs, const Strings& outputs) {
    struct Running {  // says that no call runs, however it ends
        HostDevice& device;
        ~Running() {
            std::lock_guard guard(device.lock_);
            device.running_ = nullptr;
        }
    } running{*this};
    std::shared_ptr<Engine> engine = engines_->at(component);
    {
        std::lock_guard guard(lock_);
        running_ = engine;
        thread_ = std::this_thread::get_id();
    }
    return engine->run(inputs, outputs);
}

void HostDevice::stop() {
    std::lock_guard guard(lock_);
    if (running_) running_->stop(thread_);
}

Strings device_names(const std::string& text) {
    if (text.rfind("cuda", 0) == 0 || text.find(",cuda") != std::string::npos) {
        if (text != "cuda:0") throw Error(usage, "devices=" + repr(one_line(text)) + ": a GPU runs alone, and it must be the first; use cuda:0");
        if (!compute_capability()) throw Error(environment, "device 'cuda:0': no NVIDIA GPU with its driver is here; use cpu:0");
        return {text};
    }
    std::int64_t cores = usable_cores();
    const std::string there = "use cpu:0 to cpu:" + std::to_string(cores - 1);
    Strings names;
    for (std::size_t at = 0; at <= text.size();) {
        std::size_t end = std::min(text.find(',', at), text.size());
        std::string name = text.substr(at, end - at), number = name.rfind("cpu:", 0) == 0 ? name.substr(4) : "";
        at = end + 1;
        bool whole = !number.empty() && number.size() < 6 && number.find_first_not_of("0123456789") == std::string::npos;
        if (!whole || number != std::to_string(std::stol(number)))
            throw Error(usage, "device " + repr(one_line(name)) + " is unknown; " + there);
        if (std::stol(number) >= cores) throw Error(usage, "device " + repr(name) + ": there are " + std::to_string(cores) + " cores; " + there);
        if (std::find(names.begin(), names.end(), name) != names.end()) throw Error(usage, "device " + repr(name) + " is named twice; name it once");
        names.push_back(name);
    }
    return names;
}

}  // namespace tw
