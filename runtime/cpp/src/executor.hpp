// Threads that run ready nodes on devices: batches, progress, cancelling, devices that fail. As runtime/execute/executor.py.
//
// Each device has two threads: while one runs an engine, the other prepares the inputs of the next call. A node has no side
// effects: its outputs are stored once all of its calls have ended. So it can run again on another device if one fails.
#pragma once

#include "devices.hpp"
#include "queue.hpp"
#include "values.hpp"

namespace tw {

// One run of a job's nodes, and the functions to call meanwhile. Functions may be empty.
struct Task {
    const Graph* graph = nullptr;
    Values* values = nullptr;
    std::vector<bool> runs;  // the blocks that run
    // gets each final part of the result: on any thread, several at once
    std::function<void(const Tile& place, const float* planes)> on_final;
    // the others are called by the thread that calls `run`
    std::function<void(const Tile& place)> on_part;  // after on_final
    std::function<void(const std::string& pass, std::int64_t done, std::int64_t total)> on_progress;
    std::function<bool()> is_cancelled;
    std::function<void(const std::string& note)> on_note;  // a fault that the run has survived
};

// It ended because a call of a single tile found too little memory.
struct LacksMemory : Error {
    using Error::Error;
};

class Executor {
   public:
    // `signatures`: component -> its inputs and outputs; outputs of another shape are a fault. `deadline_s`: a call that takes
    // longer hangs; 0: it follows from the calls that were timed. `pass_by_pass`: only the engines of one pass are open.
    Executor(std::vector<std::shared_ptr<Device>> devices, Named<Signature> signatures, double deadline_s, bool pass_by_pass);

    // Runs the nodes, and returns when all have ended. Throws what stopped them. One call at a time.
    void run(const Task& task);

    const std::vector<std::shared_ptr<Device>>& devices() const { return devices_; }

   private:
    friend class Round;
    using Kind = std::tuple<std::string, std::int64_t, std::int64_t, std::size_t>;  // component, sides of a tile, tiles
    std::vector<std::shared_ptr<Device>> devices_;
    Named<Signature> signatures_;
    double deadline_s_;
    bool pass_by_pass_;
    Devices state_;
    std::set<std::size_t> hung_;     // devices that will not be used again
    std::map<Kind, double> slowest_;  // seconds
};

// Throws if an output has another shape or type than its grid or its component's signature says, or is not finite.
void check_results(const Graph& graph, const Block& block, const Call& call, const Signature& signature, const Named<Tensor>& inputs,
                   const Named<Tensor>& results, std::int64_t count);

}  // namespace tw
