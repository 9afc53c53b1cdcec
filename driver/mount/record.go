package mount

import "context"

// Phase says how far the making of a volume's filesystem has come.
type Phase string

// The phases. The zero value is none of them: a record that was lost permits nothing.
const (
	Unrecorded     Phase = ""
	NeverFormatted Phase = "never-formatted" // set once, when the volume is created blank
	Formatting     Phase = "formatting"      // mkfs began and is not known to have ended; no pod has seen the volume
	Formatted      Phase = "formatted"       // holds a filesystem, and may have been mounted
	RawBlock       Phase = "raw-block"       // was handed out as a raw block device, so what it holds is the pod's
)

// FormatState is what is recorded of a volume's filesystem.
type FormatState struct {
	Phase Phase
	Type  string // of the filesystem, when Formatting or Formatted
}

// Guard is what is known of one volume, beside what its device shows. The driver implements it per volume.
type Guard interface {
	// Record returns what SetRecord recorded last.
	Record(ctx context.Context) (FormatState, error)
	// SetRecord replaces the record. It is durable when SetRecord returns nil.
	SetRecord(ctx context.Context, s FormatState) error
	// EverAllocated is the engine's word: was any cluster of the volume, its backing layers included, ever allocated?
	// In doubt the answer is yes.
	EverAllocated(ctx context.Context) (bool, error)
}
