#include "restorer.hpp"

#include <algorithm>

#include "backends.hpp"
#include "color.hpp"
#include "gpu.hpp"
#include "machine.hpp"

namespace tw {
namespace {

constexpr std::int64_t MOST_SEED = 0xFFFFFFFF;

}  // namespace

Restorer::Restorer(const Path& path, const OpenOptions& options)
    : bundle_(read_bundle(path, options.expect, options.fresh)), engines_(options.engines), weights_dir_(options.weights_dir), devices_(device_names(options.devices)) {
    if (weights_dir_ && !std::filesystem::is_directory(*weights_dir_))
        throw Error(usage, "--weights-dir " + one_line(weights_dir_->string()) + " is no folder; give the one with the weights");
    Machine machine = this_machine(devices_[0].substr(0, devices_[0].find(':')));
    choices_ = choose(bundle_, machine, options.engine, measured_on(bundle_.root, machine.processor));
    Specs specs = require(choices_);
    auto count = static_cast<std::int64_t>(devices_.size());
    if (count > 1 && !engines_.threads) engines_.threads = static_cast<int>(std::max<std::int64_t>(1, usable_cores() / count));
    // engines of one thread run on the thread that calls them, so devices of one thread can share them
    setting_ = {&bundle_, specs, engines_.low_memory, count, engines_.threads == 1 ? 1 : count, options.memory_limit};
    engines_.calls = count / setting_.copies;
    fit_program(options.batch);
    if (bundle_.manifest.constants) constants_ = read_tensors(bundle_.root / *bundle_.manifest.constants);
    for (const auto& [name, argument] : arguments_of(bundle_.program)) arguments_.emplace_back(name, argument);
    open_devices(options);
}

// The batch that the caller and the engines allow, and no tiles larger than the engines take.
void Restorer::fit_program(std::int64_t batch) {
    std::int64_t most = INT64_MAX, side = INT64_MAX;
    for (const auto& [name, spec] : setting_.specs) {
        most = std::min(most, spec->profile.batch.most);
        side = std::min(side, spec->profile.side_px.most);
    }
    if (batch < 0 || batch > most) throw Error(usage, "batch=" + std::to_string(batch) + " is not a whole number from 1 to " + std::to_string(most));
    bool above = false;
    for (const auto& p : bundle_.program.passes) above = above || (p.tiles && p.tiles->batch > most);
    for (auto& p : bundle_.program.passes) {
        if (!p.tiles) continue;
        auto& whole = p.tiles->whole_up_to_px;
        if (whole && std::max((*whole)[0], (*whole)[1]) > side) whole.reset();
        if (batch) {
            p.tiles->batch = batch;
        } else if (above) {
            p.tiles->batch = most;
        }
    }
}

void Restorer::open_devices(const OpenOptions& options) {
    // an engine is opened on its first use, perhaps by a thread that outlives this object in a call that hangs
    Named<EngineSpec> specs;
    for (const auto& [name, spec] : setting_.specs) specs[name] = *spec;
    auto open = [bundle = std::make_shared<const Bundle>(bundle_), specs, engines = engines_, folder = weights_dir_](const std::string& component) {
        const EngineSpec& spec = specs.at(component);
        const std::string table = spec.weights && !spec.weights->empty() ? *spec.weights : component;
        EngineFiles files{{}, bundle->files_of(table, folder), {}};
        for (const auto& file : spec.files) files.paths.push_back(bundle->root / file);
        if (auto references = bundle->weights.tensors.find(table); references != bundle->weights.tensors.end()) files.references = references->second;
        return backends().at(spec.backend).open(files, spec.precision, engines);
    };
    std::vector<std::shared_ptr<Device>> devices;
    std::optional<std::int64_t> free = devices_[0] == "cuda:0" ? gpu_available_bytes() : available_bytes();
    if (options.memory_limit && (!free || *options.memory_limit < *free)) free = options.memory_limit;
    bool fits = all_open(setting_, free);
    std::shared_ptr<OpenEngines> engines;
    for (const auto& name : devices_) {
        if (!engines || setting_.copies > 1) engines = std::make_shared<OpenEngines>(open);
        if (!first_) first_ = engines;
        std::shared_ptr<Device> device = std::make_shared<HostDevice>(name, engines);
        devices.push_back(options.changed ? options.changed(device) : device);
        if (!fits) continue;
        for (const auto& [component, spec] : setting_.specs) engines->at(component);
    }
    Named<Signature> signatures;
    for (const auto& [name, component] : bundle_.manifest.components) signatures[name] = {component.inputs, component.outputs};
    executor_ = std::make_unique<Executor>(std::move(devices), std::move(signatures), options.deadline_s, !fits);
}

std::int64_t Restorer::scale_of(const RestoreOptions& options) const {
    const Program& program = bundle_.program;
    std::int64_t scale = options.scale.value_or(program.scale);
    if (scale != program.scale && (!program.any_scale || scale < 1 || scale > 16))
        throw Error(usage, "scale=" + std::to_string(scale) + " does not work with this bundle; use " + (program.any_scale ? "1 to 16" : std::to_string(program.scale)));
    return scale;
}

void Restorer::check(const RestoreOptions& options) const {
    if (options.seed < 0 || options.seed > MOST_SEED)
        throw Error(usage, "seed=" + std::to_string(options.seed) + " is not a whole number from 0 to " + std::to_string(MOST_SEED));
    const auto& passes = bundle_.program.passes;
    bool stepped = std::any_of(passes.begin(), passes.end(), [](const Pass& p) { return p.steps.has_value(); });
    if (options.steps && !stepped) throw Error(usage, "steps=" + std::to_string(*options.steps) + ": " + bundle_.manifest.system + " has no steps; leave it out");
    bool moving = std::any_of(passes.begin(), passes.end(), [&](const Pass& p) { return moves(bundle_.program, p); });
    if (options.jitter && !moving) throw Error(usage, "jitter: " + bundle_.manifest.system + " has no pass that joins its tiles after every step; leave it out");
    if (std::find(COLORS.begin(), COLORS.end(), options.color) == COLORS.end())
        throw Error(usage, "color=" + repr(one_line(options.color)) + " is not one of " + join(COLORS));
}

Size Restorer::size_of(std::int64_t width, std::int64_t height, const RestoreOptions& options) const {
    return {width, height, scale_of(options), options.tile, options.overlap, options.steps, options.bits};
}

Estimate Restorer::estimate(std::int64_t width, std::int64_t height, const RestoreOptions& options) const {
    check(options);
    return tw::estimate(setting_, size_of(width, height, options), first_->opened());
}

Pixels Restorer::restore(const Picture& picture, const RestoreOptions& options, const Watch& watch) {
    check(options);
    std::int64_t scale = scale_of(options);
    Named<Tensor> inputs = gather(bundle_, options.values);
    require_memory(setting_, size_of(picture.rgb.width, picture.rgb.height, options), first_->opened());
    Pixels rgb{picture.rgb.height * scale, picture.rgb.width * scale, 3, {}};
    auto count = static_cast<std::size_t>(rgb.height * rgb.width * 3);
    options.bits == 8 ? rgb.bytes.resize(count) : rgb.words.resize(count);
    Job job;
    job.program = &bundle_.program;
    job.constants = &constants_;
    job.executor = executor_.get();
    job.rgb = &picture.rgb;
    job.scale = scale;
    job.shortest = shortest_tile(setting_.specs);
    job.seed = options.seed;
    job.tile = options.tile, job.overlap = options.overlap, job.steps = options.steps;
    job.jitter = options.jitter;
    job.inputs = std::move(inputs);
    job.on_progress = watch.on_progress;
    job.is_cancelled = watch.is_cancelled;
    job.on_note = watch.on_note;
    job.on_final = [&rgb](const Tile& place, const float* planes) { fill(rgb, place.top, place.left, planes, place.height, place.width); };
    if (watch.on_part)
        job.on_part = [&](const Tile& place) {
            Tile inside = place;
            inside.height = std::min(place.height, rgb.height - place.top);
            inside.width = std::min(place.width, rgb.width - place.left);
            if (inside.height > 0 && inside.width > 0) watch.on_part(rgb, inside);  // a part that is all padding has no pixels
        };
    walk(job);
    recolor(rgb, options.color, picture.rgb, scale);
    return rgb;
}

}  // namespace tw
