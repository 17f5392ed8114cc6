// How much memory a restoration needs, by the same rules as runtime/memory/estimate.py, and so the same figure.
#pragma once

#include "choose.hpp"
#include "plan.hpp"

namespace tw {

using Specs = Named<const EngineSpec*>;

// How a bundle was opened.
struct Setting {
    const Bundle* bundle = nullptr;
    Specs specs;  // component -> its engine
    bool low_memory = false;
    std::int64_t devices = 1;
    std::int64_t copies = 1;                   // how many of them have engines of their own
    std::optional<std::int64_t> memory_limit;  // bytes that all of the process may take
};

struct Size {
    std::int64_t width, height, scale;  // of the input, and how many times it is enlarged
    std::optional<std::int64_t> tile, overlap, steps;
    int bits = 8;
};

struct Estimate {
    std::int64_t needed_bytes;
    std::optional<std::int64_t> available_bytes;
    bool limited;  // what is available is what the caller allows
};

// Memory of `opened` engines counts as free.
Estimate estimate(const Setting& setting, const Size& size, const std::set<std::string>& opened);
// Refuses a restoration that does not fit in memory.
void require_memory(const Setting& setting, const Size& size, const std::set<std::string>& opened);

// Whether all engines are open at once. In low memory, or if they do not fit, only those of one pass are.
bool all_open(const Setting& setting, std::optional<std::int64_t> available);

std::int64_t shortest_tile(const Specs& specs);  // the shortest side that all of these engines take

}  // namespace tw
