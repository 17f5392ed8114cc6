// JSON text in UTF-8. Stricter than most readers: a key may not appear twice, and integers are told from numbers.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace tw {

struct Json {
    enum Kind { null, boolean, integer, number, string, list, object };
    Kind kind = null;
    bool truth = false;
    std::int64_t whole = 0;
    double real = 0;        // of an integer too
    bool huge = false;      // an integer beyond 64 bits
    std::string text;       // a string; or an integer's or number's digits
    std::vector<Json> items;
    struct Member;
    std::vector<Member> members;

    const Json* find(const std::string& key) const;
    std::string dump() const;  // in ASCII, on one line
};

struct Json::Member {  // a pair would have to know Json's size too early for Clang in C++20
    std::string key;
    Json value;
};

// Throws Error(damaged). `where` begins every complaint.
Json parse_json(const std::string& text, const std::string& where);

}  // namespace tw
