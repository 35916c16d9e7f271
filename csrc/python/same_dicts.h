// Whether dictionaries hold what they held, object for object: the question that a block asks about its modules at every call.
//
//   owner.__dict__   [name, value, name, value, ...]      all of them in one row, beside which the live dictionaries are walked;
//   dict             [name, value, ...]                   what those consist of is asked for before, all at once
#pragma once

#include <pybind11/pybind11.h>

#include <vector>

namespace res2net_fused {

// References are borrowed: whoever makes one keeps the owners, their types, the dictionaries and all that lies in them. So no
// reference goes through here, where the garbage collector would not see it.
class SameDicts {
 public:
  // owners: objects whose own dictionaries are compared.
  SameDicts(const pybind11::list& owners, const pybind11::list& dicts) {
    for (const pybind11::handle owner : owners) {
      PyObject* const dict = PyObject_GenericGetDict(owner.ptr(), nullptr);
      if (dict == nullptr) throw pybind11::error_already_set();
      add(owner.ptr(), dict);
      Py_DECREF(dict);
    }
    for (const pybind11::handle dict : dicts) add(nullptr, dict.ptr());
  }

  bool alike() const {
#ifdef Py_GIL_DISABLED
    return false;  // others could write meanwhile
#else
    for (const Kept& kept : all_) ask(kept);
    for (const Kept& kept : all_) {
      if (!holds(kept)) return false;
    }
    return true;
#endif
  }

 private:
  static constexpr size_t kLine = 64;

  struct Kept {
    PyObject* owner;  // or null
    const PyTypeObject* type;
    PyObject* dict;      // where there is no owner
    const char* places;  // where its values lay: a guess
    size_t first, count;
  };

  void add(PyObject* owner, PyObject* dict) {
    if (!PyDict_Check(dict)) throw pybind11::type_error("what is compared must be dictionaries");
    const auto* const inside = reinterpret_cast<const PyDictObject*>(dict);
    const void* const places = inside->ma_values != nullptr ? static_cast<const void*>(inside->ma_values) : inside->ma_keys;
    all_.push_back(
        {owner, owner == nullptr ? nullptr : Py_TYPE(owner), dict, static_cast<const char*>(places), entries_.size(),
         static_cast<size_t>(PyDict_GET_SIZE(dict))});
    Py_ssize_t position = 0;
    PyObject *name, *value;
    while (PyDict_Next(dict, &position, &name, &value)) {
      entries_.push_back(name);
      entries_.push_back(value);
    }
  }

  // A dictionary's parts lie apart: waited for one by one, they take longer than all else.
  static void ask(const Kept& kept) {
    if (kept.owner != nullptr) {
      __builtin_prefetch(reinterpret_cast<const char*>(kept.owner) - 2 * sizeof(void*));
      __builtin_prefetch(kept.owner);
    }
    __builtin_prefetch(kept.dict);
    for (size_t at = 0; at < kept.count * sizeof(void*); at += kLine) __builtin_prefetch(kept.places + at);
  }

  bool holds(const Kept& kept) const {
    PyObject* dict = kept.dict;
    if (kept.owner != nullptr) {
      if (Py_TYPE(kept.owner) != kept.type) return false;
      dict = PyObject_GenericGetDict(kept.owner, nullptr);
      if (dict == nullptr) throw pybind11::error_already_set();
      Py_DECREF(dict);  // which its owner holds
    }
    if (!PyDict_Check(dict) || static_cast<size_t>(PyDict_GET_SIZE(dict)) != kept.count) return false;
    PyObject* const* expected = entries_.data() + kept.first;
    Py_ssize_t position = 0;
    PyObject *name, *value;
    for (; PyDict_Next(dict, &position, &name, &value); expected += 2) {
      if (name != expected[0] || value != expected[1]) return false;
    }
    return true;
  }

  std::vector<Kept> all_;
  std::vector<PyObject*> entries_;  // names and values in turn
};

}  // namespace res2net_fused
