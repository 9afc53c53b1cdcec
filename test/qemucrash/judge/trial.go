package judge

import "github.com/qcow-csi/qcow-csi/qcow/storage"

// Trial is a recorded operation.
type Trial struct {
	Operation string // its name
	Shape     string // the name of what it was done to
	// Images are the files that were recorded, in the order of Op.File. The first is the one that a guest would use: later
	// ones may be its backing files.
	Images []Image
	Ops    []storage.Op
	// Beside are files that the images refer to and that the operation left alone, by name.
	Beside map[string][]byte
	// Requests are the guest's requests that the operation consisted of, in order. They go to the first image and take the
	// place of its Rule.
	Requests []Request
}

// Image is a file of a trial.
type Image struct {
	Name           string // of the file
	Initial, Final []byte // what it held before and after
	Rule           Rule
}

// Rule says what may be found on a disk after a crash. A snapshot always has to be there with its content, but for
// one that was being made or deleted, which may be there with its content.
type Rule uint8

const (
	Atomic    Rule = iota // all of the disk as before the operation, or all as after
	Piecewise             // the length, and every sector, as before or as after
)

// Request is a request of the guest. Offsets and lengths are whole sectors in bytes.
type Request struct {
	Kind           RequestKind
	Offset, Length int64
	Value          byte // of every byte written
	// The request ran while Ops[Start:End] were done.
	Start, End int
}

// RequestKind names what a [Request] asks for.
type RequestKind uint8

const (
	Write   RequestKind = iota
	Discard             // the sectors keep their value or become zeroes
	Flush
)
