package nbdexport_test

import (
	"context"
	"os/exec"
	"path/filepath"
	"reflect"
	"testing"

	"github.com/qcow-csi/qcow-csi/nbdexport"
	"github.com/qcow-csi/qcow-csi/nbdexport/nbdtest"
	"github.com/qcow-csi/qcow-csi/qcow"
	"github.com/qcow-csi/qcow-csi/qcow/storage"
)

// createImage makes an empty image and returns its path.
func createImage(t testing.TB, size int64) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "disk.qcow2")
	f, err := storage.Create(path)
	if err != nil {
		t.Fatal(err)
	}
	if err := qcow.Create(f, qcow.CreateOptions{Size: size}); err != nil {
		t.Fatal(err)
	}
	if err := f.Close(); err != nil {
		t.Fatal(err)
	}
	return path
}

// openImage opens the image at path until the end of the test, which then wants qemu-img to find it clean, where there
// is QEMU.
func openImage(t testing.TB, path string, readOnly bool) *qcow.Image {
	t.Helper()
	mode := storage.ReadWrite
	if readOnly {
		mode = storage.ReadOnly
	}
	f, err := storage.Open(path, mode)
	if err != nil {
		t.Fatal(err)
	}
	img, err := qcow.Open(f, qcow.Options{ReadOnly: readOnly})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := img.Close(); err != nil {
			t.Errorf("close: %v", err)
		}
		if qemu, err := exec.LookPath("qemu-img"); err == nil {
			if out, err := exec.Command(qemu, "check", "-q", path).CombinedOutput(); err != nil {
				t.Errorf("qemu-img check: %v: %s", err, out)
			}
		}
	})
	return img
}

func TestImageBackend(t *testing.T) {
	nbdtest.TestBackend(t, func(t *testing.T) nbdexport.Backend {
		return nbdexport.NewImageBackend(openImage(t, createImage(t, nbdtest.BackendSize), false), nbdexport.ImageOptions{})
	})
}

func TestImageBackendDescribesImage(t *testing.T) {
	path := createImage(t, 3*mib)
	for _, readOnly := range []bool{false, true} {
		t.Run("", func(t *testing.T) {
			img := openImage(t, path, readOnly)
			want := nbdexport.Info{
				Size: 3 * mib, ReadOnly: readOnly, MinimumBlock: 1, PreferredBlock: 64 << 10, MultiConn: true, FastZero: true,
				Contexts: []string{nbdexport.ContextAllocation},
			}
			if got := nbdexport.NewImageBackend(img, nbdexport.ImageOptions{}).Info(); !reflect.DeepEqual(got, want) {
				t.Errorf("Info() = %+v, want %+v", got, want)
			}
		})
	}
}

// TestImageGrowsWhileServed grows an image under its client, as the expansion of a volume does.
func TestImageGrowsWhileServed(t *testing.T) {
	img := openImage(t, createImage(t, mib), false)
	client := connect(t, nbdexport.NewImageBackend(img, nbdexport.ImageOptions{}))
	if err := client.WriteBytes(4*mib-5, []byte("early")); err == nil {
		t.Error("wrote past the end")
	}
	if err := img.Resize(context.Background(), 4*mib); err != nil {
		t.Fatal(err)
	}
	if err := client.WriteBytes(4*mib-5, []byte("after")); err != nil {
		t.Error(err)
	}
	client.Disconnect()
}
