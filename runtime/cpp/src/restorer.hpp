// A bundle with its engines on devices. As runtime/restore.py.
#pragma once

#include "estimate.hpp"
#include "inputs.hpp"
#include "pictures.hpp"
#include "walk.hpp"

namespace tw {

struct OpenOptions {
    EngineOptions engines;
    std::optional<std::string> engine, expect;
    std::optional<Path> weights_dir;
    bool fresh = false;  // also reads files with a remembered digest
    std::int64_t batch = 0;  // 0: as the bundle says
    std::string devices = "cpu:0";
    std::optional<std::int64_t> memory_limit;
    double deadline_s = 0;
    std::function<std::shared_ptr<Device>(std::shared_ptr<Device>)> changed;  // for tests: a device that stands before one of these
};

struct RestoreOptions {
    std::int64_t seed = 0;
    std::optional<std::int64_t> tile, overlap, steps, scale;
    int bits = 8;
    std::string color = "off";
    bool jitter = false;
    std::vector<Value> values;
};

// The caller's functions. The thread that restores calls them.
struct Watch {
    std::function<void(const std::string& pass, std::int64_t done, std::int64_t total)> on_progress;
    std::function<void(const Pixels& rgb, const Tile& place)> on_part;
    std::function<bool()> is_cancelled;
    std::function<void(const std::string& note)> on_note;
};

class Restorer {
   public:
    Restorer(const Path& path, const OpenOptions& options);
    Restorer(const Restorer&) = delete;  // parts of it point to its bundle
    Restorer& operator=(const Restorer&) = delete;

    Pixels restore(const Picture& picture, const RestoreOptions& options, const Watch& watch);
    Estimate estimate(std::int64_t width, std::int64_t height, const RestoreOptions& options) const;
    std::int64_t scale_of(const RestoreOptions& options) const;  // refuses one that the bundle cannot do

    const Bundle& bundle() const { return bundle_; }
    const Named<Choice>& choices() const { return choices_; }
    std::string devices() const { return join(devices_, ","); }
    const std::vector<std::pair<std::string, Argument>>& arguments() const { return arguments_; }

   private:
    Bundle bundle_;
    EngineOptions engines_;
    std::optional<Path> weights_dir_;
    Strings devices_;
    Named<Choice> choices_;
    Setting setting_;
    Named<Tensor> constants_;
    std::vector<std::pair<std::string, Argument>> arguments_;
    std::shared_ptr<OpenEngines> first_;  // engines of the first device
    std::unique_ptr<Executor> executor_;

    void fit_program(std::int64_t batch);
    void open_devices(const OpenOptions& options);
    void check(const RestoreOptions& options) const;
    Size size_of(std::int64_t width, std::int64_t height, const RestoreOptions& options) const;
};

}  // namespace tw
