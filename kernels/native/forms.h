// The forms of an op in graphs: without an input that may be left out its node has a name of its own (kernels/face.py).
#pragma once

#include <cstddef>
#include <map>
#include <string>
#include <vector>

namespace tilewright {

// An input of a face: `bias?` may be left out; inputs with one word behind the mark, `cos?turn`, go together.
struct FaceInput {
  std::string name, group;
  bool optional;

  FaceInput(const char* text) {
    const std::string all(text);
    const size_t mark = all.find('?');
    optional = mark != std::string::npos;
    name = all.substr(0, mark);
    group = optional && mark + 1 < all.size() ? all.substr(mark + 1) : name;
  }
};

struct Form {
  std::string name;           // the node's: QkvNormRope_without_c
  std::vector<size_t> taken;  // the places in the face of the inputs that the node has
};

// Every form of an op whose face has these inputs.
inline std::vector<Form> forms_of(const std::string& op, const std::vector<FaceInput>& inputs) {
  std::map<std::string, size_t> groups;
  for (const FaceInput& input : inputs) {
    if (input.optional) groups.emplace(input.group, groups.size());
  }
  std::vector<Form> forms;
  for (size_t left_out = 0; left_out < size_t{1} << groups.size(); ++left_out) {
    Form form{op, {}};
    for (size_t i = 0; i < inputs.size(); ++i) {
      if (inputs[i].optional && left_out >> groups[inputs[i].group] & 1) {
        form.name += (form.name == op ? "_without_" : "_") + inputs[i].name;
      } else {
        form.taken.push_back(i);
      }
    }
    forms.push_back(form);
  }
  return forms;
}

}  // namespace tilewright
