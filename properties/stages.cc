#include "properties/stages.h"

#include <algorithm>
#include <memory>

namespace tp {

namespace {

std::string other_name(const std::map<std::string, std::string>& names, const std::string& name) {
  const auto other = names.find(name);
  return other == names.end() ? name : other->second;
}

// A stage's own names for inputs that have others.
class RenamedInputs : public WholeInputs {
 public:
  RenamedInputs(const WholeInputs& inputs, const std::map<std::string, std::string>& names)
      : inputs_(inputs), names_(names) {}
  const Matrix& operator[](const std::string& name) const override {
    return inputs_[other_name(names_, name)];
  }

 private:
  const WholeInputs& inputs_;
  const std::map<std::string, std::string>& names_;
};

}  // namespace

Stage renamed(Stage stage, std::string name, const Names& names) {
  const auto shared = std::make_shared<const Names>(names);
  stage.name = std::move(name);
  for (auto* list : {&stage.inputs, &stage.outputs}) {
    for (TensorSpec& t : *list) t.name = other_name(shared->tensors, t.name);
    std::erase_if(*list, [](const TensorSpec& t) { return t.name.empty(); });
  }
  for (StoredInput& input : stage.stored) {
    if (input.name.empty()) input.name = input.tensor;  // the loader still asks for that
    input.tensor = other_name(shared->tensors, input.tensor);
  }
  std::erase_if(stage.stored, [](const StoredInput& input) { return input.tensor.empty(); });
  stage.buffers = [buffers = stage.buffers, shared](int tp_rank) {
    std::vector<LocalBuffer> all;
    for (LocalBuffer& buffer : buffers(tp_rank)) {
      for (Piece& piece : buffer.pieces) piece.tensor = other_name(shared->tensors, piece.tensor);
      std::erase_if(buffer.pieces, [](const Piece& piece) { return piece.tensor.empty(); });
      if (const auto alias = shared->buffers.find(buffer.name); alias != shared->buffers.end()) {
        buffer.name = alias->second.name;
        if (alias->second.width > 0) buffer.cols = alias->second.width;
        for (Piece& piece : buffer.pieces) piece.at += alias->second.at;
      }
      const auto same = std::find_if(all.begin(), all.end(), [&](const LocalBuffer& other) {
        return other.name == buffer.name;
      });
      if (same == all.end()) {
        all.push_back(buffer);
      } else {  // columns of one that is there already
        same->pieces.insert(same->pieces.end(), buffer.pieces.begin(), buffer.pieces.end());
      }
    }
    return all;
  };
  stage.run = [run = stage.run, shared](RankRun& r) {
    RankRun other(r, shared->buffers);
    run(other);
  };
  stage.reference = [reference = stage.reference, shared](const WholeInputs& in) {
    return reference(RenamedInputs(in, shared->tensors));
  };
  if (stage.blind_to) {
    stage.blind_to = [blind_to = stage.blind_to, shared](const WholeInputs& in,
                                                         const std::vector<Budget>& budgets) {
      return blind_to(RenamedInputs(in, shared->tensors), budgets);
    };
  }
  return stage;
}

}  // namespace tp
