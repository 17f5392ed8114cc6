// Compares the library with tests/vectors. Prints a line for every case that differs, and how many cases were compared.
#include <algorithm>
#include <cstdio>
#include <cstring>
#include <functional>

#include "bundle.hpp"
#include "color.hpp"
#include "images.hpp"
#include "lower.hpp"

using namespace tw;

namespace {

int compared = 0, wrong = 0;

void differs(const std::string& file, const Json& item, const std::string& found) {
    ++wrong;
    std::printf("%s: %s\n  found %s\n", file.c_str(), item.dump().substr(0, 600).c_str(), found.substr(0, 600).c_str());
}

std::int64_t whole(const Json& item, const char* name) { return item.find(name)->whole; }

std::optional<std::int64_t> maybe(const Json& item, const char* name) {
    const Json* value = item.find(name);
    return value->kind == Json::null ? std::nullopt : std::optional(value->whole);
}

std::string bits(const Floats& numbers) {
    Shape all;
    for (float number : numbers) {
        std::uint32_t word = 0;
        std::memcpy(&word, &number, 4);
        all.push_back(word);
    }
    return repr(all);
}

Floats floats(const Json& list) {
    Floats numbers;
    for (const auto& item : list.items) {
        auto word = static_cast<std::uint32_t>(item.whole);
        std::memcpy(&numbers.emplace_back(), &word, 4);
    }
    return numbers;
}

std::string described(const TilePlan& plan) {
    return "{\"lefts\": " + repr(plan.lefts) + ", \"sides\": " + repr(Shape{plan.height, plan.width, plan.tile_height, plan.tile_width, plan.overlap}) +
           ", \"tops\": " + repr(plan.tops) + "}";
}

// The result of a case as text, or its refusal with its code; against that of the case.
void compare(const std::string& file, const Json& item, const std::string& expected, const std::function<std::string()>& compute) {
    ++compared;
    std::string found, right = expected;
    if (const Json* refused = item.find("refused")) right = refused->text + " (" + item.find("code")->text + ")";
    try {
        found = compute();
    } catch (const Error& error) {
        found = std::string(error.what()) + " (" + std::to_string(error.code) + ")";
    } catch (const Invalid& error) {
        found = error.what();
    }
    if (found != right) differs(file, item, found + "\n  right " + right);
}

std::string dumped(const Json& item, const char* name) {
    const Json* value = item.find(name);
    return value ? value->dump() : "";
}

void tiles(const std::string& file, const Json& item) {
    if (item.find("moved")) {
        compare(file, item, dumped(item, "moved"), [&] {
            std::int64_t multiple = whole(item, "multiple");
            TilePlan plan = tile_plan(whole(item, "width"), whole(item, "height"), whole(item, "tile"), whole(item, "overlap"), multiple);
            return described(moved(plan, multiple, whole(item, "seed"), whole(item, "step")));
        });
        return;
    }
    compare(file, item, dumped(item, "plan") + dumped(item, "rows") + dumped(item, "columns"), [&] {
        TilePlan plan = tile_plan(whole(item, "width"), whole(item, "height"), whole(item, "tile"), whole(item, "overlap"), whole(item, "multiple"));
        auto [rows, columns] = tile_weights(plan, whole(item, "px"));
        std::string text = described(plan);
        for (const auto* axis : {&rows, &columns}) {
            Strings all;
            for (const auto& weight : *axis) all.push_back(bits(weight));
            text += "[" + join(all) + "]";
        }
        return text;
    });
}

void schedules(const std::string& file, const Json& item) {
    compare(file, item, dumped(item, "tables"), [&] {
        const Json& steps = *item.find("schedule");
        Steps parsed{steps.find("schedule")->text, whole(steps, "count"), 256, {}};
        for (const auto& [name, value] : steps.find("options")->members) {
            Scalar& option = parsed.options[name];
            option.kind = value.kind == Json::string ? Scalar::words : value.kind == Json::integer ? Scalar::whole : Scalar::real;
            option.integer = value.whole, option.number = value.real, option.text = value.kind == Json::string ? value.text : "";
        }
        Strings tables;
        for (const auto& [name, table] : schedule(parsed, parsed.count, whole(item, "tokens"))) tables.push_back('"' + name + "\": " + bits(table));
        return "{" + join(tables) + "}";
    });
}

void noise(const std::string& file, const Json& item) {
    if (const Json* counter = item.find("counter")) {
        auto word = [](const Json& list, int i) { return static_cast<std::uint32_t>(list.items[i].whole); };
        const Json& key = *item.find("key");
        compare(file, item, dumped(item, "words"), [&] {
            auto words = philox4x32({word(*counter, 0), word(*counter, 1), word(*counter, 2), word(*counter, 3)}, {word(key, 0), word(key, 1)});
            return repr(Shape(words.begin(), words.end()));
        });
        return;
    }
    const Json* digest = item.find("sha256");
    compare(file, item, digest ? digest->text : dumped(item, "values"), [&] {
        Floats field = normal(whole(item, "seed"), whole(item, "region"), whole(item, "stream"), whole(item, "channels"), whole(item, "top"),
                              whole(item, "left"), whole(item, "height"), whole(item, "width"));
        return digest ? sha256(field.data(), field.size() * 4) : bits(field);
    });
}

// The picture of tools/vectors.py.
Pixels picture(const Json& sides) {
    Pixels pixels{sides.items[1].whole, sides.items[0].whole, 3, {}};
    for (std::int64_t y = 0; y < pixels.height; ++y)
        for (std::int64_t x = 0; x < pixels.width; ++x)
            for (std::int64_t c = 0; c < 3; ++c) pixels.bytes.push_back(static_cast<std::uint8_t>((((x * 37) ^ (y * 91)) + c * 53 + x * y / 3) & 255));
    return pixels;
}

Pixels deep_picture(const Json& sides) {
    Pixels pixels = picture(sides);
    for (auto level : pixels.bytes) pixels.words.push_back(static_cast<std::uint16_t>(level * 256 + level * 7 % 256));
    pixels.bytes.clear();
    return pixels;
}

void deep_images(const std::string& file, const Json& item) {
    if (const Json* sides = item.find("deep")) {
        compare(file, item, item.find("sha256")->text, [&] {
            Pixels pixels = deep_picture(*sides);
            Enlarged enlarged{pixels, whole(item, "scale"), whole(item, "multiple"), whole(item, "least")};
            const auto& crop = item.find("crop")->items;
            Floats planes = enlarged.crop(crop[0].whole, crop[1].whole, crop[2].whole, crop[3].whole);
            return sha256(planes.data(), planes.size() * sizeof(float));
        });
    } else if (const Json* colours = item.find("deep colours")) {
        compare(file, item, item.find("grey")->text, [&] {
            Pixels pixels = luma(deep_picture(*colours));
            return sha256(pixels.words.data(), pixels.words.size() * sizeof(std::uint16_t));
        });
    } else {
        compare(file, item, dumped(item, "rounded to 16 bits"), [&] {
            Floats planes = floats(*item.find("numbers")), all;
            auto count = static_cast<std::int64_t>(planes.size());
            for (int c = 0; c < 3; ++c) all.insert(all.end(), planes.begin(), planes.end());
            Pixels rgb{1, count, 3, {}, std::vector<std::uint16_t>(3 * count)};
            fill(rgb, 0, 0, all.data(), 1, count);
            Shape first;
            for (std::int64_t i = 0; i < count; ++i) first.push_back(rgb.words[3 * i]);
            return repr(first);
        });
    }
}

void images(const std::string& file, const Json& item) {
    if (item.find("deep") || item.find("deep colours") || item.find("rounded to 16 bits")) return deep_images(file, item);
    if (const Json* numbers = item.find("numbers")) {
        compare(file, item, dumped(item, "rounded"), [&] {
            Floats planes = floats(*numbers);
            auto count = static_cast<std::int64_t>(planes.size());
            Floats all;
            for (int c = 0; c < 3; ++c) all.insert(all.end(), planes.begin(), planes.end());
            Pixels rgb{1, count, 3, std::vector<std::uint8_t>(3 * count)};
            fill(rgb, 0, 0, all.data(), 1, count);
            Shape first;
            for (std::int64_t i = 0; i < count; ++i) first.push_back(rgb.bytes[3 * i]);
            return repr(first);
        });
        return;
    }
    if (const Json* grey = item.find("grey")) {
        compare(file, item, grey->text, [&] {
            Pixels pixels = luma(picture(*item.find("colours")));
            return sha256(pixels.bytes.data(), pixels.bytes.size());
        });
        return;
    }
    compare(file, item, dumped(item, "padded") + item.find("sha256")->text, [&] {
        Pixels pixels = picture(*item.find("picture"));
        Enlarged enlarged{pixels, whole(item, "scale"), whole(item, "multiple"), whole(item, "least")};
        const auto& crop = item.find("crop")->items;
        std::vector<std::uint8_t> eight;
        for (float value : enlarged.crop(crop[0].whole, crop[1].whole, crop[2].whole, crop[3].whole))
            eight.push_back(static_cast<std::uint8_t>(value * 255.0F + 0.5F));
        return repr(Shape{3, enlarged.height(), enlarged.width()}) + sha256(eight.data(), eight.size());
    });
}

void colors(const std::string& file, const Json& item) {
    compare(file, item, item.find("sha256")->text, [&] {
        std::int64_t scale = whole(item, "scale");
        const Json& sides = *item.find("picture");
        Json enlarged = sides;
        for (auto& side : enlarged.items) side.whole *= scale;
        Pixels source = whole(item, "source_bits") == 16 ? deep_picture(sides) : picture(sides);
        Pixels rgb = whole(item, "bits") == 16 ? deep_picture(enlarged) : picture(enlarged);
        auto reverse = [](auto& levels) {  // all pixels, but not their channels
            std::reverse(levels.begin(), levels.end());
            for (std::size_t i = 0; i + 2 < levels.size(); i += 3) std::swap(levels[i], levels[i + 2]);
        };
        reverse(rgb.bytes);
        reverse(rgb.words);
        recolor(rgb, item.find("color")->text, source, scale);
        return rgb.bits() == 16 ? sha256(rgb.words.data(), rgb.words.size() * 2) : sha256(rgb.bytes.data(), rgb.bytes.size());
    });
}

std::string programs_folder;

Json stored(const std::string& name) { return parse_json(bytes_of(programs_folder + "/" + name + ".json"), name); }

void graphs(const std::string& file, const Json& item) {
    compare(file, item, dumped(item, "plans") + dumped(item, "nodes") + " " + (item.find("last") ? item.find("last")->text + item.find("sha256")->text : ""), [&] {
        const std::string& name = item.find("program")->text;
        Program program = read_program(stored(name), name);
        Layout lay = layout(program, whole(item, "height"), whole(item, "width"), maybe(item, "tile"), std::nullopt, maybe(item, "steps"));
        Graph graph = lower(program, lay.plans, lay.steps, item.find("jitter") ? maybe(item, "jitter") : std::nullopt);
        Strings plans;
        for (const auto& p : program.passes) plans.push_back('"' + p.name + "\": " + described(lay.plans[p.name]));
        std::sort(plans.begin(), plans.end());
        std::string lines, last;
        int nodes = 0;
        for (const auto& block : graph.blocks)
            for (std::int64_t tile = 0; tile < block.size; ++tile) {
                std::set<std::pair<std::int64_t, std::int64_t>> waits;
                for (const auto& wait : block.waits)
                    for (auto other : wait.tiles(tile, graph.blocks[wait.block].size)) waits.insert({wait.block, other});
                last = graph.pass(block).name + " " + block.section + " " + std::to_string(block.step) + " " + std::to_string(tile) + ":";
                for (auto [b, t] : waits) last += " " + std::to_string(b) + "." + std::to_string(t);
                lines += last += "\n";
                ++nodes;
            }
        return "{" + join(plans) + "}" + std::to_string(nodes) + " " + last + sha256(lines.data(), lines.size());
    });
}

// Puts a value at a path of a document, or takes out what is there.
void change(Json& tree, const Json& change) {
    Json* node = &tree;
    const auto& path = change.items[0].items;
    for (std::size_t i = 0; i < path.size(); ++i) {
        bool last = i + 1 == path.size();
        if (node->kind == Json::list) {
            auto index = static_cast<std::size_t>(std::stoul(path[i].text));
            if (last && change.items.size() == 1) {
                node->items.erase(node->items.begin() + static_cast<std::ptrdiff_t>(index));
                return;
            }
            node = &node->items.at(index);
            continue;
        }
        auto member = std::find_if(node->members.begin(), node->members.end(), [&](const auto& m) { return m.first == path[i].text; });
        if (last && change.items.size() == 1) {
            node->members.erase(member);
            return;
        }
        if (member == node->members.end()) member = node->members.insert(member, {path[i].text, Json{}});
        node = &member->second;
    }
    *node = change.items[1];
}

Json changed(Json tree, const Json* changes) {
    if (changes)
        for (const auto& one : changes->items) change(tree, one);
    return tree;
}

void programs(const std::string& file, const Json& item) {
    compare(file, item, "runs", [&] {
        const std::string& name = item.find("program")->text;
        Json around = changed(stored(name + ".signatures"), item.find("signatures"));
        Program program = read_program(changed(stored(name), item.find("changes")), "program.json");
        Named<Signature> components;
        Named<TensorSpec> constants;
        for (const auto& [component, signature] : around.find("components")->members) components[component] = read_signature(signature, component);
        for (const auto& [constant, spec] : around.find("constants")->members) constants[constant] = read_tensor_spec(spec, constant);
        check_program(program, components, constants);
        return std::string("runs");
    });
}

std::map<std::string, Json> bases;

void documents(const std::string& file, const Json& item) {
    const std::string& kind = item.find("kind")->text;
    if (const Json* document = item.find("document")) bases[kind] = *document;
    if (kind == "text") {
        compare(file, item, "bundle.json: not valid JSON (", [&] {
            try {
                return parse_json(item.find("text")->text, "bundle.json").dump();
            } catch (const Error& error) {
                return std::string(error.what()).substr(0, 29);
            }
        });
        return;
    }
    compare(file, item, "read", [&] {
        if (kind == "twice") return parse_json(item.find("text")->text, "bundle.json").dump();
        Json document = changed(bases.at(kind), item.find("changes"));
        if (kind == "manifest") {
            read_manifest(document, "bundle.json");
        } else {
            read_weights(document, "weights.json");
        }
        return std::string("read");
    });
}

void safetensors(const std::string& file, const Json& item) {
    compare(file, item, item.find("tensors") ? dumped(item, "tensors") : "refused", [&] {
        std::string data, header = item.find("header")->text;
        for (int i = 0; i < 8; ++i) data += static_cast<char>(static_cast<std::uint64_t>(whole(item, "length")) >> 8 * i);
        data += header + std::string(64, '\0');
        Strings tensors;
        try {
            for (const auto& [name, tensor] : safetensors_header(reinterpret_cast<const unsigned char*>(data.data()), data.size(), "a"))
                tensors.push_back('"' + name + "\": [\"" + tensor.spec.dtype + "\", " + repr(tensor.spec.shape) + ", " + std::to_string(tensor.start) + ", " +
                                  std::to_string(tensor.length) + "]");
        } catch (const Error&) {
            return std::string("refused");
        }
        return "{" + join(tensors) + "}";
    });
}

}  // namespace

int main(int count, char** words) {
    if (count != 3) return std::fputs("usage: vectors VECTORS PROGRAMS\n", stderr), 2;
    programs_folder = words[2];
    std::set<std::string> known;
    for (auto [name, check] : {std::pair{"tiles", tiles}, {"schedules", schedules}, {"noise", noise}, {"images", images}, {"colors", colors}, {"graphs", graphs},
                               {"programs", programs}, {"documents", documents}, {"safetensors", safetensors}}) {
        std::string path = std::string(words[1]) + "/" + name + ".json";
        known.insert(std::string(name) + ".json");
        for (auto& item : parse_json(bytes_of(path), path).items) {
            // a refusal of a safetensors header has no words in common, so it is no `refused` of `compare`
            if (std::string(name) == "safetensors")
                for (auto& member : item.members)
                    if (member.first == "refused") member.first = "not read";
            check(name, item);
        }
    }
    for (const auto& entry : std::filesystem::directory_iterator(words[1]))
        if (!known.count(entry.path().filename().string())) ++wrong, std::printf("%s is not compared\n", entry.path().c_str());
    std::printf("%d cases, %d wrong\n", compared, wrong);
    return wrong ? 1 : 0;
}
