// Package interop tests the engine against QEMU's tools, both ways: what is written here QEMU must find clean, map
// alike and read back; what QEMU wrote must be read back here, and stay clean when it is written on.
//
// QEMU never vouches for the content alone: every test keeps its own copy of what the virtual disk should hold. All
// randomness comes from QCOW_CSI_SEED, which is printed and otherwise the time. QCOW_CSI_LONG=1 runs every cluster size with every
// refcount width instead of a cross-section.
//
// The matrix (TestMatrixOfQEMU, TestMatrixOfEngine) combines everything that an image can have. In each direction there are 400
// images, chosen so that each pair of values occurs that no rule leaves out (TestMatrixCovers), and four of five triples; the long form has 3000
// random combinations more. Where QEMU and the engine are said to refuse a combination, they do (TestMatrixLeavesOutWhatIsRefused).
// Which combinations there are does not depend on the seed, only what is written. A failure tells the commands that make the image.
package interop
