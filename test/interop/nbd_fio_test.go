package interop_test

import (
	"testing"

	"github.com/qcow-csi/qcow-csi/nbdexport"
	"github.com/qcow-csi/qcow-csi/qcow"
	"github.com/qcow-csi/qcow-csi/test/require"
)

// TestNBDFioVerifies writes with fio, and lets it verify what it has written.
func TestNBDFioVerifies(t *testing.T) {
	require.Tool(t, "fio")
	path := imagePath(t)
	create(t, path, qcow.CreateOptions{Size: 64 << 20})
	s := export(t, "unix", path, nbdexport.ImageOptions{})
	args := []string{
		"--name=verify", "--ioengine=nbd", "--uri=" + s.uri(), "--output-format=terse", "--rw=randrw", "--bsrange=512-128k", "--bs_unaligned=0",
		"--iodepth=16", "--verify=crc32c", "--verify_fatal=1", "--fsync=64", "--group_reporting", "--verify_state_save=0",
	}
	if long() {
		// Each job has its own eighth: verification needs that nobody else writes there.
		args = append(args, "--numjobs=8", "--size=8M", "--offset_increment=8M", "--time_based", "--runtime=600")
	} else {
		args = append(args, "--numjobs=2", "--size=8M", "--offset_increment=32M")
	}
	run(t, "fio", args...)
}
