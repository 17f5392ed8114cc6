#include "options.hpp"

#include <charconv>
#include <cmath>
#include <cstdio>
#include <cstring>

const char* const SHARED_HELP = R"(  --bundle BUNDLE     the folder of a bundle
  --seed N            of the noise (default 0)
  --steps N           of the sampler (default: as the bundle says)
  --set NAME=VALUE    an argument of the bundle; may be repeated. An array is its numbers with commas between them
  --tile N            side of the tiles, in pixels of the result
  --jitter            move the borders of tiles from step to step, where steps join tiles
  --overlap N         width of the strip that tiles share
  --scale N           how many times the image is enlarged
  --batch N           most tiles in a call of a network
  --devices NAMES     cpu:0,cpu:1 run tiles at the same time; cuda:0 is a GPU (default: cpu:0)
  --threads N         of a device (default: the devices share the cores)
  --engine NAME       the name, precision or backend of the engines
  --memory low        less memory, more time
  --memory-limit SIZE most memory, such as 2GiB; an image that needs more is refused
  --deadline-s N      a call of a network that takes so many seconds hangs
  --weights-dir DIR   the folder of the weights, if they moved since the build
  --expect DIGEST     accept only this bundle
  --fresh             read all files of the bundle, also those whose digest is remembered
  --native FILE       Tilewright's own kernels, libtilewright_cpu.so (default: those beside libtilewright.so); '' is none
)";

namespace {

template <class Number>
void whole(const char* name, const char* text, Number least, Number& out) {
    if (!text) return;
    const char* end = text + std::strlen(text);
    auto result = std::from_chars(text, end, out);
    if (result.ec != std::errc() || result.ptr != end || out < least)
        throw Usage(std::string(name) + " " + text + " is not a whole number of at least " + std::to_string(least));
}

// The number of bytes in a text like 2GiB, 1.5GB or 800MiB.
std::int64_t bytes_of(const std::string& text) {
    double number = 0;
    auto result = std::from_chars(text.data(), text.data() + text.size(), number);
    std::string unit(result.ptr, text.data() + text.size());
    while (!unit.empty() && unit[0] == ' ') unit.erase(0, 1);
    for (char& c : unit) c = static_cast<char>(c >= 'A' && c <= 'Z' ? c + 32 : c);
    const std::string prefixes = "kmgt";
    double factor = unit.empty() || unit == "b" ? 1 : 0;
    if (std::size_t power = unit.empty() ? std::string::npos : prefixes.find(unit[0]); power != std::string::npos) {
        if (unit.substr(1) == "b") factor = std::pow(1000.0, power + 1);
        if (unit.substr(1) == "ib") factor = std::pow(1024.0, power + 1);
    }
    number *= factor;
    if (result.ec != std::errc() || !(number >= 1 && number < 0x1p63)) throw Usage("--memory-limit " + text + " is no amount of memory; write 800MiB, 2GiB or 2GB");
    return static_cast<std::int64_t>(number);
}

}  // namespace

const char* Words::text(const char* name) const {
    auto option = options.find(name);
    return option == options.end() ? nullptr : option->second.c_str();
}

void Words::number(const char* name, std::int32_t least, std::int32_t& out) const { whole(name, text(name), least, out); }
void Words::number(const char* name, std::int64_t least, std::int64_t& out) const { whole(name, text(name), least, out); }

Words Words::read(int count, char** words, const std::string& alone, const std::string& with_value) {
    const std::string all_alone = alone + " --fresh --jitter --json --version --help ";
    const std::string all_with_value = with_value +
                                       " --bundle --seed --steps --set --tile --overlap --scale --batch --devices --threads --engine --memory"
                                       " --memory-limit --deadline-s --weights-dir --expect --native ";
    Words all;
    for (int i = 1; i < count; ++i) {
        std::string word = words[i], between = " " + word + " ";
        if (word.rfind("--", 0) != 0) {
            all.files.push_back(word);
        } else if (all_alone.find(between) != std::string::npos) {
            all.options[word] = "";
        } else if (all_with_value.find(between) == std::string::npos) {
            throw Usage("unknown option " + word + "; see --help");
        } else if (i + 1 == count) {
            throw Usage(word + " needs a value; see --help");
        } else if (word == "--set") {
            std::string setting = words[++i];
            std::size_t equals = setting.find('=');
            if (equals == std::string::npos) throw Usage("--set " + setting + " is not NAME=VALUE");
            all.settings.emplace_back(setting.substr(0, equals), setting.substr(equals + 1));
        } else {
            all.options[word] = words[++i];
        }
    }
    return all;
}

tw_params params_of(const Words& words) {
    if (!words.text("--bundle")) throw Usage("--bundle is missing; see --help");
    const std::string memory = words.text("--memory") ? words.text("--memory") : "fast";
    if (memory != "low" && memory != "fast") throw Usage("--memory " + memory + " is not one of fast, low");
    tw_params params = tw_default_params();
    words.number("--threads", 0, params.threads);
    words.number("--batch", 1, params.batch);
    params.low_memory = memory == "low";
    params.fresh = words.text("--fresh") != nullptr;
    params.devices = words.text("--devices");
    params.engine = words.text("--engine");
    params.weights_dir = words.text("--weights-dir");
    params.expect = words.text("--expect");
    params.native_library = words.text("--native");
    if (const char* limit = words.text("--memory-limit")) params.memory_limit = bytes_of(limit);
    if (const char* text = words.text("--deadline-s")) {
        auto result = std::from_chars(text, text + std::strlen(text), params.deadline_s);
        if (result.ec != std::errc() || *result.ptr || !(params.deadline_s > 0 && params.deadline_s <= 1e8)) throw Usage(std::string("--deadline-s ") + text + " is no number of seconds above 0 to 100000000");
    }
    return params;
}

tw_options options_of(const Words& words, std::vector<tw_value>& values) {
    tw_options options = tw_default_options();
    words.number("--seed", 0, options.seed);
    words.number("--steps", 1, options.steps);
    words.number("--tile", 1, options.tile);
    words.number("--overlap", 0, options.overlap);
    words.number("--scale", 1, options.scale);
    options.jitter = words.text("--jitter") != nullptr;
    for (const auto& [name, text] : words.settings) values.push_back({name.c_str(), text.c_str(), nullptr, nullptr, 0, nullptr});
    options.values = values.data();
    options.value_count = values.size();
    return options;
}

std::string json_text(const std::string& text) {
    std::string out = "\"";
    for (char c : text) {
        if (c == '"' || c == '\\') out += '\\';
        char code[8];
        std::snprintf(code, sizeof code, "\\u%04x", static_cast<unsigned char>(c));
        out += static_cast<unsigned char>(c) < 32 ? code : std::string(1, c);
    }
    return out + '"';
}

int guarded(const char* tool, int (*run)(int count, char** words), int count, char** words) {
    try {
        return run(count, words);
    } catch (const tilewright::Error& error) {
        std::fprintf(stderr, "%s: %s\n", tool, error.what());
        return error.status;
    } catch (const std::exception& error) {
        std::fprintf(stderr, "%s: internal error: %s\n", tool, error.what());
        return TW_ERROR;
    }
}
