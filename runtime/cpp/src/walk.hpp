// Running a program on one image.
#pragma once

#include "executor.hpp"

namespace tw {

struct Job {
    const Program* program = nullptr;
    const Named<Tensor>* constants = nullptr;
    Executor* executor = nullptr;
    const Pixels* rgb = nullptr;
    std::int64_t scale = 1;
    std::int64_t shortest = 1;  // side of a tile that all engines take
    std::int64_t seed = 0;
    std::optional<std::int64_t> tile, overlap, steps;
    bool jitter = false;  // tiles move from step to step, in passes that join them after every step
    Named<Tensor> inputs;  // of the caller; values of passes without tiles too
    // as those of a Task
    std::function<void(const Tile& place, const float* planes)> on_final;
    std::function<void(const Tile& place)> on_part;
    std::function<void(const std::string& pass, std::int64_t done, std::int64_t total)> on_progress;
    std::function<bool()> is_cancelled;
    std::function<void(const std::string& note)> on_note;
};

// If memory does not suffice for a tile, the image begins anew with smaller tiles.
void walk(const Job& job);

}  // namespace tw
