#include "trust.hpp"

#include "digests.hpp"

namespace tw {

Named<std::set<std::string>> strangers(const Manifest& manifest) {
    Named<std::set<std::string>> names;
    auto cache = cache_dir();
    for (const auto& [component, c] : manifest.components) {
        for (const auto& spec : c.engines) {
            if (spec.backend != "aoti") continue;  // the only engines that are machine code
            std::error_code error;
            bool trusted = cache && std::filesystem::is_regular_file(*cache / "compiled" / manifest.files.at(spec.files[0]).sha256, error);
            if (!trusted) names[component].insert(spec.name);
        }
    }
    return names;
}

}  // namespace tw
