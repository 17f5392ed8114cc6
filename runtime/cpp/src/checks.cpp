#include <algorithm>

#include "executor.hpp"

namespace tw {
namespace {

// The place of a block in the program, as a user knows it.
std::string when(const Graph& graph, const Block& block) {
    std::string moment = block.section == "each" ? "step " + std::to_string(block.step + 1) : block.section == "shared" ? "once" : block.section;
    return "pass " + repr(graph.pass(block).name) + ", " + moment;
}

}  // namespace

void check_results(const Graph& graph, const Block& block, const Call& call, const Signature& signature, const Named<Tensor>& inputs,
                   const Named<Tensor>& results, std::int64_t count) {
    const Named<Grid>& grids = graph.program->grids;
    std::map<std::string, std::int64_t> sizes = {{"batch", count}};
    for (const auto& [name, tensor] : inputs) {
        const Dims& dims = signature.inputs.at(name).shape;
        for (std::size_t i = 0; i < std::min(dims.size(), tensor.shape.size()); ++i)
            if (dims[i].named() && dims[i].name != "batch_or_1") sizes[dims[i].name] = tensor.shape[i];
    }
    for (const auto& [name, target] : call.outputs) {
        const Shape& shape = results.at(name).shape;
        const TensorSpec& spec = signature.outputs.at(name);
        Shape right;
        if (auto grid = grids.find(target); grid != grids.end()) {
            const TilePlan& plan = block.plan;
            right = {count, grid->second.channels, plan.tile_height / grid->second.px, plan.tile_width / grid->second.px};
        } else {
            for (std::size_t i = 0; i < spec.shape.size(); ++i) {
                const Dim& dim = spec.shape[i];
                if (!dim.named()) {
                    right.push_back(dim.size);
                } else if (spec.shape.size() == shape.size()) {  // a size that no input has is as the first output says
                    right.push_back(sizes.emplace(dim.name, shape[i]).first->second);
                } else {
                    right.push_back(sizes.count(dim.name) ? sizes.at(dim.name) : 0);
                }
            }
        }
        const std::string place = when(graph, block) + ": " + call.run + "." + name;
        if (shape != right)
            throw Error(damaged, place + " has shape " + repr(shape) + ", not " + repr(right) + "; verify the bundle with 'tilewright export verify'");
        if (results.at(name).dtype != spec.dtype)
            throw Error(damaged, place + " is " + results.at(name).dtype + ", not " + spec.dtype + "; verify the bundle with 'tilewright export verify'");
    }
    for (const auto& [name, target] : call.outputs) {
        NotFinite found = not_finite(results.at(name));
        if (!found.count) continue;
        throw Error(accuracy, when(graph, block) + ": " + call.run + "." + name + " holds " + repr(found.first) + ", " + std::to_string(found.count) +
                                  " of " + std::to_string(results.at(name).count()) +
                                  " numbers are not finite; check the weights, and the bundle with 'tilewright export verify'");
    }
}

}  // namespace tw
