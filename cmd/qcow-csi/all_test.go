package main

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/qcow-csi/qcow-csi/driver/attach"
	"github.com/qcow-csi/qcow-csi/driver/pool"
	"github.com/qcow-csi/qcow-csi/test/require"
)

func TestStorageDirectory(t *testing.T) {
	dir := t.TempDir()
	kubelet := t.TempDir()
	for _, err := range []error{
		os.Symlink(dir, filepath.Join(dir, "link")),
		os.Mkdir(filepath.Join(kubelet, "pools"), 0o700),
		os.Symlink(filepath.Join(kubelet, "pools"), filepath.Join(dir, "trap")),
	} {
		if err != nil {
			t.Fatal(err)
		}
	}
	kubeletDirs = append(kubeletDirs, kubelet)
	t.Cleanup(func() { kubeletDirs = kubeletDirs[:len(kubeletDirs)-1] })
	for _, name := range []string{dir, dir + "/", filepath.Join(dir, "link")} {
		if got, err := storageDirectory(name); err != nil || got != dir {
			t.Errorf("%s: %s, %v", name, got, err)
		}
	}
	if _, err := storageDirectory(kubelet + "-beside"); !errors.Is(err, os.ErrNotExist) { // only the beginning of its name
		t.Error(err)
	}
	for _, name := range []string{kubelet, filepath.Join(kubelet, "pools"), filepath.Join(dir, "trap")} {
		if _, err := storageDirectory(name); err == nil || !strings.Contains(err.Error(), "kubelet deletes") {
			t.Errorf("%s: %v", name, err)
		}
	}
	if _, err := storageDirectory(""); err == nil {
		t.Error("none is accepted")
	}
}

func TestAllRefuses(t *testing.T) {
	file := filepath.Join(t.TempDir(), "file")
	if err := os.WriteFile(file, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	taken := t.TempDir()
	p, err := pool.Open(t.Context(), taken, pool.Options{})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := p.Close(); err != nil {
			t.Error(err)
		}
	})
	for name, c := range map[string]struct {
		args  []string
		class error
		says  string
	}{
		"no directory":      {nil, nil, "--storage-dir is missing"},
		"absent directory":  {[]string{"--storage-dir", "/nonexistent"}, os.ErrNotExist, "/nonexistent"},
		"a file":            {[]string{"--storage-dir", file}, nil, "not a directory"},
		"served already":    {[]string{"--storage-dir", taken}, pool.ErrBusy, taken},
		"unknown attacher":  {[]string{"--storage-dir", t.TempDir(), "--attacher", "tape"}, attach.ErrInvalid, "tape"},
		"arguments":         {[]string{"--storage-dir", t.TempDir(), "more"}, nil, "more"},
		"unknown flag":      {[]string{"--stroage-dir", "x"}, nil, "stroage"},
		"negative volumes":  {[]string{"--storage-dir", t.TempDir(), "--attacher", "fuse", "--max-volumes", "-1"}, nil, "negative"},
		"endpoint is wrong": {[]string{"--storage-dir", t.TempDir(), "--attacher", "fuse", "--endpoint", "tcp://:1"}, nil, "unix://"},
		"wild driver name":  {[]string{"--storage-dir", t.TempDir(), "--attacher", "fuse", "--driver-name", "a/b"}, nil, "a/b"},
	} {
		t.Run(name, func(t *testing.T) {
			root := newRootCommand()
			root.SetArgs(append([]string{"all"}, c.args...))
			err := root.ExecuteContext(t.Context())
			require.Feature(t, !errors.Is(err, attach.ErrUnavailable), "needs FUSE and loop devices")
			if err == nil || c.class != nil && !errors.Is(err, c.class) || !strings.Contains(err.Error(), c.says) {
				t.Errorf("%v, want %q", err, c.says)
			}
		})
	}
}
