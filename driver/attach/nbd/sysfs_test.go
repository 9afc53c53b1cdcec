package nbd

import (
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

// fakeSysfs makes a directory with these files.
func fakeSysfs(t *testing.T, files map[string]string) sysfs {
	t.Helper()
	root := t.TempDir()
	for name, content := range files {
		path := filepath.Join(root, name)
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			t.Fatal(err)
		}
		if strings.HasSuffix(name, "/") {
			if err := os.MkdirAll(path, 0o755); err != nil {
				t.Fatal(err)
			}
			continue
		}
		if err := os.WriteFile(path, []byte(content), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	return sysfs(root)
}

func TestDisks(t *testing.T) {
	s := fakeSysfs(t, map[string]string{
		"nbd0/backend":  "qcow-csi:qcow-csi.io:pool/a\n",
		"nbd0/size":     "2048\n",
		"nbd1/size":     "0\n", // not in use
		"nbd2/backend":  "\n",  // somebody's, who gave it no name
		"nbd2/size":     "8\n",
		"nbd3/backend":  "qcow-csi:qcow-csi.io.test:pool/a\n",
		"nbd3/size":     "8\n",
		"nbd4/backend":  "rbd/image\n",
		"nbd4/size":     "8\n",
		"nbd12/backend": "qcow-csi:qcow-csi.io:pool/b \n", // the blank is part of the name
		"nbd12/size":    "0\n",
		"loop0/backend": "qcow-csi:qcow-csi.io:pool/c\n",
	})
	got, err := s.disks("qcow-csi.io")
	want := []disk{{0, "nbd0", "pool/a", 1 << 20}, {12, "nbd12", "pool/b ", 0}}
	if err != nil || !slices.Equal(got, want) {
		t.Errorf("disks %+v, %v; want %+v", got, err, want)
	}
	if d, ok, err := s.find("qcow-csi.io", "pool/b "); !ok || err != nil || d != want[1] {
		t.Errorf("found %+v, %v, %v", d, ok, err)
	}
	if d, ok, err := s.find("qcow-csi.io", "pool/x"); ok || err != nil {
		t.Errorf("found %+v, %v, %v", d, ok, err)
	}
	for name, content := range map[string]string{"nbd12/size": "many\n", "nbd0/size": ""} {
		if err := os.WriteFile(filepath.Join(string(s), name), []byte(content), 0o644); err != nil {
			t.Fatal(err)
		}
		if got, err := s.disks("qcow-csi.io"); err == nil {
			t.Errorf("disks %+v although %s is %q", got, name, content)
		}
	}
}

func TestDeviceNumber(t *testing.T) {
	s := fakeSysfs(t, map[string]string{"nbd0/dev": "43:96\n", "nbd1/dev": "43\n"})
	if n, err := s.deviceNumber("nbd0"); n != unix.Mkdev(43, 96) || err != nil {
		t.Errorf("number %#x, %v", n, err)
	}
	for _, name := range []string{"nbd1", "nbd2"} {
		if n, err := s.deviceNumber(name); err == nil {
			t.Errorf("number %#x of %s", n, name)
		}
	}
}

func TestUser(t *testing.T) {
	files := map[string]string{
		"nbd0/dev":              "43:0\n",
		"nbd0/holders/":         "",
		"nbd0/nbd0p1/dev":       "43:1\n",
		"nbd0/nbd0p1/holders/":  "",
		"nbd1/dev":              "43:32\n",
		"nbd1/holders/":         "",
		"nbd10/dev":             "43:320\n",
		"nbd10/holders/dm-3":    "",
		"nbd2/dev":              "43:64\n",
		"nbd2/nbd2p1/dev":       "43:65\n",
		"nbd2/nbd2p1/holders/x": "",
	}
	s := fakeSysfs(t, files)
	const others = "22 1 259:2 / / rw,relatime shared:1 - ext4 /dev/nvme0n1p2 rw\n" +
		"23 22 0:21 / /proc rw - proc proc rw\n" +
		"24 22 43:320 / /mnt/ten rw - ext4 /dev/nbd10 rw\n" +
		"short line\n\n"
	for _, test := range []struct{ name, mounts, want string }{
		{"nbd1", others, ""},
		{"nbd0", others, ""},
		{"nbd10", "", "device dm-3"},
		{"nbd2", others, "device x"},
		{"nbd1", others + "30 22 43:32 / /mnt/a rw,relatime shared:7 master:1 - ext4 /dev/nbd1 rw\n", "the mount on /mnt/a"},
		{"nbd0", others + "30 22 43:1 / /mnt/part rw - xfs /dev/nbd0p1 rw\n", "the mount on /mnt/part"},
		{"nbd1", others + "30 22 0:44 / /mnt/b rw - btrfs /dev/nbd1 rw\n", "the mount on /mnt/b"},
		{"nbd1", others + "30 22 0:44 / /mnt/b rw - btrfs /dev/nbd11 rw\n", ""},
		{"nbd1", others + "30 22 0:5 /nbd1 /var/lib/pod/dev rw - devtmpfs devtmpfs rw\n", ""}, // a bound node holds nothing
	} {
		if got, err := s.user(test.name, test.mounts); got != test.want || err != nil {
			t.Errorf("%s is used by %q (%v), want %q", test.name, got, err, test.want)
		}
	}
	if got, err := s.user("nbd9", others); err == nil {
		t.Errorf("nbd9, which does not exist, is used by %q", got)
	}
}
