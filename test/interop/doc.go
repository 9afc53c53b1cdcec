// Package interop tests the engine against QEMU's tools, both ways: what is written here QEMU must find clean, map
// alike and read back; what QEMU wrote must be read back here, and stay clean when it is written on.
//
// QEMU never vouches for the content alone: every test keeps its own copy of what the virtual disk should hold. All
// randomness comes from QCOW_CSI_SEED, which is printed and otherwise the time. QCOW_CSI_LONG=1 runs the whole matrix of
// cluster sizes and refcount widths instead of a cross-section.
package interop
