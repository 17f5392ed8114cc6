// Running a program on one image: values, joins in tile order, checks of what networks return.
#pragma once

#include "engine.hpp"
#include "images.hpp"
#include "lower.hpp"

namespace tw {

// Called with each final part of the result: its place, and its planes [3, height, width].
using OnFinal = std::function<void(std::int64_t top, std::int64_t left, const float* planes, std::int64_t height, std::int64_t width)>;

struct Job {
    const Program* program = nullptr;
    const Named<Signature>* signatures = nullptr;
    const Named<Tensor>* constants = nullptr;
    std::function<Engine&(const std::string&)> engine;  // of a component
    const Enlarged* image = nullptr;
    std::int64_t seed = 0;
    std::optional<std::int64_t> tile, overlap, steps;
    Named<Tensor> inputs;  // of the caller; values of passes without tiles too
    std::function<void(const std::string& pass, std::int64_t done, std::int64_t total)> on_progress;
    OnFinal on_final;
    std::function<bool()> stopped;  // asked between calls
};

struct Layout {
    Named<TilePlan> plans;
    Named<Tables> tables;
    Named<std::int64_t> steps;
};

// All that depends on the size of an image and not on its pixels.
Layout layout(const Program& program, std::int64_t height, std::int64_t width, std::optional<std::int64_t> tile,
              std::optional<std::int64_t> overlap, std::optional<std::int64_t> steps);

void walk(const Job& job);

}  // namespace tw
