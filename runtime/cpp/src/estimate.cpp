#include "estimate.hpp"

#include <algorithm>
#include <cstdio>

#include "held.hpp"
#include "machine.hpp"

namespace tw {
namespace {

constexpr double OPEN_SHARE = 0.7;  // share of the free memory for all engines together; the rest is for work
constexpr std::int64_t PROCESS_BYTES = 80000000;  // Python's, NumPy's, Pillow's and ONNX Runtime's; here it is less
constexpr double ARENA = 1.4;       // memory for calls in proportion to the values alive, measured
constexpr std::int64_t OPENVINO_BYTES = 60000000, MODEL_BYTES = 25000000;  // its code; a network that it runs on a device
constexpr std::int64_t GRAPH = 30;  // bytes of an open engine for each byte of its graph's file

std::string gib(std::int64_t bytes) {
    char text[32];
    std::snprintf(text, sizeof text, "%.2f GiB", static_cast<double>(bytes) / (1 << 30));
    return text;
}

std::string table_of(const std::string& component, const EngineSpec& spec) { return spec.weights && !spec.weights->empty() ? *spec.weights : component; }

// The memory that the weights of open engines take for themselves: re-packed, or reordered for convolutions.
std::int64_t weights_bytes(const Setting& setting, const Specs& specs) {
    std::int64_t bytes = 0;
    std::set<std::string> wide, stored;
    for (const auto& [name, spec] : specs) {
        bytes += setting.low_memory ? spec->memory.copied : 0;
        (spec->precision == "float32" ? wide : stored).insert(table_of(name, *spec));
    }
    if (setting.low_memory) return bytes;
    for (const auto& [table, references] : setting.bundle->weights.tensors)
        for (const auto& [name, reference] : references)
            bytes += wide.count(table) ? 4 * product(reference.shape) : stored.count(table) ? reference.length : 0;
    return bytes;
}

std::int64_t graph_bytes(const Setting& setting, const Specs& specs) {
    std::int64_t bytes = 0;
    for (const auto& [name, spec] : specs) bytes += setting.bundle->manifest.files.at(spec->files[0]).size;
    return bytes;
}

Specs part_of(const Specs& specs, const std::set<std::string>& names) {
    Specs part;
    for (const auto& [name, spec] : specs)
        if (names.count(name)) part[name] = spec;
    return part;
}

// The memory inside the largest call of a pass, on all devices that its tiles can keep busy.
double calls_bytes(const Setting& setting, const Planned& planned) {
    const auto& [p, plan] = planned;
    std::int64_t batch = p->tiles ? p->tiles->batch : 1, at_once = std::min(setting.devices, (plan.count() + batch - 1) / batch);
    double most = 0;
    for (const auto& placed : p->calls()) {
        const Memory& memory = setting.specs.at(placed.call->run)->memory;
        auto px = static_cast<double>(plan.tile_height * plan.tile_width);
        double of_tile = memory.per_tile + memory.per_px * px + memory.per_px2 * px * px;
        double call = memory.fixed + static_cast<double>(p->tiles ? std::min(batch, plan.count()) : 1) * of_tile;
        most = std::max(most, static_cast<double>(at_once) * call);
    }
    return most;
}

std::int64_t needed_bytes(const Setting& setting, const std::vector<Planned>& passes, std::int64_t height, std::int64_t width, const Size& size, bool open) {
    const Bundle& bundle = *setting.bundle;
    Held held(bundle, passes, size.steps, setting.devices);
    double peak = 0;
    for (std::size_t place = 0; place < passes.size(); ++place) {
        std::set<std::string> called;
        for (const auto& placed : passes[place].first->calls()) called.insert(placed.call->run);
        double most = 0;
        for (std::size_t before = open ? 0 : place; before <= place; ++before) most = std::max(most, calls_bytes(setting, passes[before]));
        double working = (setting.copies > 0 ? ARENA : 0) * most;
        Specs opened = open ? setting.specs : part_of(setting.specs, called);
        std::int64_t compiled = 0;
        for (const auto& [name, spec] : opened) compiled += spec->backend == "openvino";
        std::int64_t code = setting.copies > 0 && compiled > 0 ? OPENVINO_BYTES + MODEL_BYTES * compiled * setting.devices : 0;
        std::int64_t engines = weights_bytes(setting, opened) + GRAPH * graph_bytes(setting, opened);
        peak = std::max(peak, static_cast<double>(held.at(place)) + working + static_cast<double>(code + setting.copies * engines));
    }
    std::int64_t picture = 3 * height * width + 3 * height * width / (bundle.program.scale * bundle.program.scale);  // values of the result and the source
    std::int64_t pictures_bytes = picture * size.bits / 8;
    std::int64_t fixed = bundle.manifest.constants ? bundle.manifest.files.at(*bundle.manifest.constants).size : 0;
    return static_cast<std::int64_t>(static_cast<double>(PROCESS_BYTES + pictures_bytes + fixed) + peak);
}

struct Planning {
    std::vector<Planned> passes;
    std::int64_t height, width;
};

Planning planning(const Setting& setting, const Size& size, std::optional<std::int64_t> tile) {
    const Program& program = setting.bundle->program;
    std::int64_t least = least_px(program, tile, shortest_tile(setting.specs)), multiple = program.multiple_px;
    auto padded = [&](std::int64_t side) { return (std::max(side * size.scale, least) + multiple - 1) / multiple * multiple; };
    Planning planning{{}, padded(size.height), padded(size.width)};
    for (const auto& p : program.passes) planning.passes.emplace_back(&p, plan_of(program, p, planning.height, planning.width, tile, size.overlap));
    return planning;
}

// Refuses tiles that an engine was not made for.
void require_tiles(const Setting& setting, const Planning& planning) {
    for (const auto& [p, plan] : planning.passes) {
        if (!p->tiles) continue;
        for (const auto& placed : p->calls())
            for (auto side : {plan.tile_height, plan.tile_width}) {
                const EngineSpec& spec = *setting.specs.at(placed.call->run);
                if (auto reason = outside(spec, side); !reason.empty())
                    throw Error(usage, "engine " + spec.name + " of " + placed.call->run + " " + reason + "; use another tile or engine");
            }
    }
}

// The bytes in low memory with the smallest tiles, and the options that ask for both.
std::pair<std::int64_t, Strings> least_memory(const Setting& setting, const Size& size) {
    Setting low = setting;
    low.low_memory = true;
    std::optional<std::int64_t> tile = size.tile;
    Planning plans = planning(setting, size, tile);
    while (true) {
        Named<TilePlan> by_name;
        for (const auto& [p, plan] : plans.passes) by_name[p->name] = plan;
        auto smaller = smaller_tile(setting.bundle->program, by_name, size.overlap, shortest_tile(setting.specs));
        if (!smaller) break;
        tile = smaller;
        plans = planning(setting, size, tile);
    }
    Strings options;
    if (tile != size.tile) options.push_back("tile " + std::to_string(*tile));
    if (!setting.low_memory) options.emplace_back("low_memory");
    return {needed_bytes(low, plans.passes, plans.height, plans.width, size, false), options};
}

}  // namespace

bool all_open(const Setting& setting, std::optional<std::int64_t> available) {
    bool fits = !available || static_cast<double>(setting.copies * weights_bytes(setting, setting.specs)) < OPEN_SHARE * static_cast<double>(*available);
    return !setting.low_memory && fits;
}

std::int64_t shortest_tile(const Specs& specs) {
    std::int64_t shortest = 1;
    for (const auto& [name, spec] : specs) shortest = std::max(shortest, spec->profile.side_px.least);
    return shortest;
}

Estimate estimate(const Setting& setting, const Size& size, const std::set<std::string>& opened) {
    Planning plans = planning(setting, size, size.tile);
    require_tiles(setting, plans);
    std::optional<std::int64_t> available = available_bytes();
    if (available) *available += setting.copies * weights_bytes(setting, part_of(setting.specs, opened));
    bool limited = setting.memory_limit && (!available || *setting.memory_limit < *available);
    if (limited) available = setting.memory_limit;
    std::int64_t needed = needed_bytes(setting, plans.passes, plans.height, plans.width, size, all_open(setting, available));
    return {needed, available, limited};
}

void require_memory(const Setting& setting, const Size& size, const std::set<std::string>& opened) {
    Estimate needs = estimate(setting, size, opened);
    if (!needs.available_bytes || needs.needed_bytes <= *needs.available_bytes) return;
    auto [least, options] = least_memory(setting, size);
    throw Error(resource, std::to_string(size.width * size.scale) + "x" + std::to_string(size.height * size.scale) + " px needs about " +
                              gib(needs.needed_bytes) + " of memory, " + gib(*needs.available_bytes) + " are " + (needs.limited ? "allowed" : "free") + "; " +
                              (options.empty() ? "use a smaller image" : "the least is " + gib(least) + ", with " + join(options, " and ")));
}

}  // namespace tw
