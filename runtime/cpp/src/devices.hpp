// Where engines run: a device runs one call at a time. As runtime/execute/devices.py.
#pragma once

#include <functional>
#include <mutex>

#include "engine.hpp"

namespace tw {

class Device {
   public:
    virtual ~Device() = default;
    virtual const std::string& name() const = 0;  // "cpu:0"
    // An error is a fault of the device. Error(resource) and bad_alloc mean too little memory for so large a call.
    virtual Named<Tensor> run(const std::string& component, const Named<Tensor>& inputs, const Strings& outputs) = 0;
    virtual void stop() {}  // any thread may call it: the call that runs, if there is one, throws soon
    virtual void close(const std::set<std::string>& components) { static_cast<void>(components); }  // gives back their memory
};

// The engine of each component, opened on its first use. Several devices may share them.
class OpenEngines {
   public:
    explicit OpenEngines(std::function<std::unique_ptr<Engine>(const std::string&)> open) : open_(std::move(open)) {}

    std::shared_ptr<Engine> at(const std::string& component);
    void close(const std::set<std::string>& components);
    std::set<std::string> opened() const;

   private:
    std::function<std::unique_ptr<Engine>(const std::string&)> open_;
    mutable std::mutex lock_;
    Named<std::shared_ptr<Engine>> engines_;
};

// Processor cores, or a GPU whose engines take their inputs from the host's memory and put their outputs there.
class HostDevice : public Device {
   public:
    HostDevice(std::string name, std::shared_ptr<OpenEngines> engines) : name_(std::move(name)), engines_(std::move(engines)) {}

    const std::string& name() const override { return name_; }
    Named<Tensor> run(const std::string& component, const Named<Tensor>& inputs, const Strings& outputs) override;
    void stop() override;
    void close(const std::set<std::string>& components) override { engines_->close(components); }

   private:
    std::string name_;
    std::shared_ptr<OpenEngines> engines_;
    std::mutex lock_;
    std::shared_ptr<Engine> running_;
    std::thread::id thread_;
};

// The devices in a text such as "cpu:0,cpu:1": each exists, and is named once. A GPU runs alone.
Strings device_names(const std::string& text);

}  // namespace tw
