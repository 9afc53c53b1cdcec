// Package handover is what the host and process 1 of a test guest tell each other: files in the one directory they share.
package handover

import "time"

const (
	// Variable is the environment variable that names the shared directory, on the guest's kernel command line.
	Variable = "QCOW_CSI_VM"
	// ProgramVariable is the environment variable that names the program which was built for the tests.
	ProgramVariable = "QCOW_CSI_VM_PROGRAM"
	// OrderFile holds the [Order], as JSON, from the host.
	OrderFile = "order.json"
	// StatusFile holds how the binary ended, from the guest, as [os.ProcessState] words it. Without it the guest died.
	StatusFile = "status"
	// DiskDir is where the guest mounts its disk.
	DiskDir = "/run/disk"
)

// Order says what the guest does.
type Order struct {
	Modules []string      // paths of kernel modules, in the order to load them
	Disk    bool          // the first disk holds an ext4 filesystem, for DiskDir
	Binary  string        // path
	Args    []string      // of the binary
	Env     []string      // of the binary, beyond PATH and HOME
	Timeout time.Duration // after which the binary is killed and the guest ends
}
