#include "walk.hpp"

namespace tw {
namespace {

// What the caller gives, and the blocks that run.
struct Sources {
    Named<Tensor> inputs, values;
    std::vector<bool> runs;
};

Tensor input_of(const Job& job, const std::string& name) {
    if (auto entry = job.inputs.find(name); entry != job.inputs.end()) return entry->second;
    const Program& program = *job.program;
    const Input& spec = program.inputs.at(name);
    if (spec.standard.kind == Scalar::words) return job.constants->at(spec.standard.text.substr(1));
    std::string label = name;
    for (const auto& [file, f] : program.files)
        for (const auto& [tensor, target] : f.tensors)
            if (target == name) label = file;
    for (const auto& [text, t] : program.texts)
        if (t.ids.count(name)) label = text;
    throw Error(usage, label + " has no default; give it a value");
}

// The passes without tiles that need not run, because the caller gives all their values.
std::set<std::string> skipped_passes(const Job& job) {
    std::set<std::string> skipped;
    for (const auto& p : job.program->passes) {
        if (p.tiles) continue;
        std::string present, missing;
        for (const auto& name : p.writes()) {
            std::string& kind = job.inputs.count(name) ? present : missing;
            if (kind.empty()) kind = name;
        }
        if (present.empty()) continue;
        if (!missing.empty()) throw Error(usage, "input " + repr(present) + " is given without " + repr(missing) + "; give all or none");
        skipped.insert(p.name);
    }
    return skipped;
}

// All inputs are checked before any work.
Sources sources_of(const Job& job, const Graph& graph) {
    Sources sources;
    std::set<std::string> values = job.program->untiled_values(), skipped = skipped_passes(job);
    for (const auto& [name, tensor] : job.inputs)
        if (values.count(name)) sources.values[name] = tensor;
    for (const auto& block : graph.blocks) sources.runs.push_back(!skipped.count(graph.pass(block).name));
    for (const auto& p : job.program->passes) {
        if (skipped.count(p.name)) continue;
        for (const auto& placed : p.calls())
            for (const auto& [name, source] : placed.call->inputs)
                if (source[0] == '$' && !sources.inputs.count(source.substr(1))) sources.inputs[source.substr(1)] = input_of(job, source.substr(1));
    }
    return sources;
}

}  // namespace

void walk(const Job& job) {
    const Program& program = *job.program;
    std::optional<std::int64_t> tile = job.tile;
    while (true) {
        Enlarged image{*job.rgb, job.scale, program.multiple_px, least_px(program, tile, job.shortest)};
        Layout lay = layout(program, image.height(), image.width(), tile, job.overlap, job.steps);
        Graph graph = lower(program, lay.plans, lay.steps, job.jitter ? std::optional(job.seed) : std::nullopt);
        Sources sources = sources_of(job, graph);
        Values values(graph, lay, image, job.seed, *job.constants, sources.inputs, sources.values, sources.runs);
        try {
            job.executor->run({&graph, &values, sources.runs, job.on_final, job.on_part, job.on_progress, job.is_cancelled, job.on_note});
            return;
        } catch (const LacksMemory&) {
            tile = smaller_tile(program, lay.plans, job.overlap, job.shortest);
            if (!tile) throw;
        }
        if (job.on_note) job.on_note("too little memory: the image began anew with --tile " + std::to_string(*tile));
    }
}

}  // namespace tw
