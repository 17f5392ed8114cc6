// Choosing the engine of a component: the best one that fits the machine, and for every other one the reason why not.
// As runtime/engines/choose.py.
#pragma once

#include "bundle.hpp"

namespace tw {

// One engine's speed and accuracy, as reports/measured.json has them.
struct Measured {
    double seconds_per_megapixel = 0;
    std::optional<double> psnr_db;
};

// The parts of a machine that decide which engines run on it.
struct Machine {
    std::int64_t cores = 1;
    std::set<std::string> instructions;                            // of the CPU
    Named<std::pair<std::string, std::string>> backends;           // that can run -> their package and its version
    std::string processor;
    std::string device = "cpu";                                    // or cuda: the kind of the devices that are asked for
    std::optional<std::array<std::int64_t, 2>> compute_capability;  // of the GPU
};
// This machine, with devices of one kind.
Machine this_machine(const std::string& device);

struct Choice {
    const EngineSpec* spec = nullptr;   // none: no engine fits
    Named<std::string> misfits, others;  // engine that cannot run here, or that was not chosen -> why
};

// Component -> engine -> what was measured on such a processor. A file that cannot be read counts as none.
Named<Named<Measured>> measured_on(const Path& bundle, const std::string& processor);

// For the components that the program calls. A wish holds for those that can fulfil it.
Named<Choice> choose(const Bundle& bundle, const Machine& machine, const std::optional<std::string>& wish, const Named<Named<Measured>>& measured);
// Refuses components without an engine, with all reasons.
Named<const EngineSpec*> require(const Named<Choice>& choices);

// The reason why an engine does not take tiles with this side, or an empty text.
std::string outside(const EngineSpec& spec, std::int64_t side);

}  // namespace tw
