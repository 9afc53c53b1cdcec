package pool

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"

	"k8s.io/klog/v2"
)

// The crash tests run an operation in a process of its own, a copy of the test binary, that is killed before the n-th
// change to the directory, for every n. Then they open the directory again and look what is there.

const crashEnv = "QCOW_CSI_POOL_CRASH" // operation, number of the fatal step, directory

func TestMain(m *testing.M) {
	klog.SetSlogLogger(slog.New(slog.DiscardHandler)) // damaged directories are the point of many tests
	if spec := os.Getenv(crashEnv); spec != "" {
		if err := crashChild(spec); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		os.Exit(0)
	}
	os.Exit(m.Run())
}

// operations are what is interrupted. Each runs on a pool that has the volume "old", except "found".
var operations = map[string]func(ctx context.Context, p *Pool) error{
	"found": func(context.Context, *Pool) error { return nil },
	"create": func(ctx context.Context, p *Pool) error {
		_, err := p.Create(ctx, Spec{Name: "new", Size: SizeRange{Required: 2 * mebibyte}})
		return err
	},
	"delete": func(ctx context.Context, p *Pool) error {
		if p.names["old"] == nil { // deleted the first time
			return nil
		}
		return p.Delete(ctx, p.names["old"].id)
	},
	"record": func(ctx context.Context, p *Pool) error {
		h, err := p.Acquire(ctx, p.names["old"].id, false)
		if err != nil {
			return err
		}
		return errors.Join(h.SetFormat(ctx, Format{State: Formatted, Filesystem: "ext4"}), h.Release())
	},
	"expand": func(ctx context.Context, p *Pool) error {
		_, err := p.Expand(ctx, p.names["old"].id, SizeRange{Required: 4 * mebibyte})
		return err
	},
}

func crashChild(spec string) error {
	parts := strings.SplitN(spec, ":", 3)
	fatal, err := strconv.Atoi(parts[1])
	if err != nil {
		return err
	}
	p, err := open(context.Background(), parts[2], Options{}, func(op, name string) error {
		if fatal--; fatal == 0 {
			return syscall.Kill(os.Getpid(), syscall.SIGKILL)
		}
		return nil
	})
	if err != nil {
		return err
	}
	return errors.Join(operations[parts[0]](context.Background(), p), p.Close())
}

// interrupt runs an operation in dir and kills it before its n-th step. It reports whether there was such a step.
func interrupt(t *testing.T, operation string, n int, dir string) bool {
	t.Helper()
	cmd := exec.CommandContext(t.Context(), os.Args[0])
	cmd.Env = append(os.Environ(), fmt.Sprintf("%s=%s:%d:%s", crashEnv, operation, n, dir))
	out, err := cmd.CombinedOutput()
	var exit *exec.ExitError
	switch {
	case err == nil:
		return false
	case errors.As(err, &exit) && exit.Sys().(syscall.WaitStatus).Signal() == syscall.SIGKILL:
		return true
	}
	t.Fatalf("%s: %v: %s", operation, err, out)
	return false
}

// oldPool makes a pool with the volume "old" in it, and returns its directory and the volume.
func oldPool(t *testing.T) (string, Volume) {
	t.Helper()
	dir := t.TempDir()
	p := openPool(t, dir)
	v := mustCreate(t, p, "old", 2*mebibyte)
	fill(t, p, v.ID, 1, mebibyte)
	if err := p.Close(); err != nil {
		t.Fatal(err)
	}
	return dir, v
}

func TestKilledAtAnyStep(t *testing.T) {
	for _, operation := range []string{"found", "create", "delete", "record", "expand"} {
		t.Run(operation, func(t *testing.T) {
			template, old := oldPool(t)
			for n := 1; ; n++ {
				dir := t.TempDir()
				if operation != "found" {
					if err := os.CopyFS(dir, os.DirFS(template)); err != nil {
						t.Fatal(err)
					}
				}
				killed := interrupt(t, operation, n, dir)
				t.Run(fmt.Sprint("step ", n), func(t *testing.T) { examine(t, operation, dir, old, !killed) })
				if !killed {
					if n == 1 {
						t.Fatal("the operation has no steps")
					}
					return
				}
			}
		})
	}
}

// examine opens a directory in which an operation was interrupted, or done. It finds the state before or the one after,
// nothing in between, and the operation can be repeated.
func examine(t *testing.T, operation, dir string, old Volume, done bool) {
	p := openPool(t, dir)
	if left := tree(t, filepath.Join(dir, tmpDir)); len(left) > 0 {
		t.Errorf("left: %v", left)
	}
	for _, name := range tree(t, dir) {
		if filepath.Ext(name) == asideSuffix && operation != "record" { // overwritten by the next replacement
			t.Errorf("left: %s", name)
		}
	}
	volumes, _, err := p.List(t.Context(), "", 0)
	if err != nil {
		t.Fatal(err)
	}
	index := slices.IndexFunc(volumes, func(v Volume) bool { return v.Name == "old" })
	for _, v := range volumes {
		if v.Err != nil {
			t.Errorf("volume %s: %v", v.Name, v.Err)
		}
	}
	switch operation {
	case "found":
		if len(volumes) > 0 {
			t.Errorf("volumes: %v", volumes)
		}
		return
	case "delete":
		if done && index >= 0 {
			t.Error("not deleted")
		}
	default:
		if index < 0 {
			t.Fatal("a volume was lost")
		}
	}
	if index >= 0 {
		got := volumes[index]
		want := []Volume{old, old}
		want[1].Format = Format{State: Formatted, Filesystem: "ext4"}
		if operation == "expand" {
			want[1] = old
			want[1].Size = 4 * mebibyte
		}
		if got != want[0] && got != want[1] || done && operation != "create" && got != want[1] {
			t.Errorf("volume is %+v, want %+v or, once done, %+v", got, want[0], want[1])
		}
		expect(t, p, old.ID, 1, mebibyte)
	}
	if err := operations[operation](t.Context(), p); err != nil {
		t.Errorf("repeated: %v", err)
	}
	if operation == "create" {
		if ids := list(t, p); len(ids) != 2 {
			t.Errorf("volumes: %v", ids)
		}
		fill(t, p, p.names["new"].id, 2, mebibyte)
	}
}

// TestFailedAtAnyStep fails each step of each operation once. The operation fails and publishes nothing, the pool goes
// on, and the operation can be repeated, at once and after a restart.
func TestFailedAtAnyStep(t *testing.T) {
	errInjected := fmt.Errorf("injected: %w", syscall.ENOSPC)
	for _, operation := range []string{"create", "delete", "record"} {
		t.Run(operation, func(t *testing.T) {
			template, old := oldPool(t)
			for n := 1; ; n++ {
				dir := t.TempDir()
				if err := os.CopyFS(dir, os.DirFS(template)); err != nil {
					t.Fatal(err)
				}
				p := openPool(t, dir)
				countdown, failed := n, ""
				p.dir.step = func(op, name string) error {
					if countdown--; countdown == 0 {
						failed = op + " " + name
						return errInjected
					}
					return nil
				}
				err := operations[operation](t.Context(), p)
				p.dir.step = nil
				if failed == "" {
					if err != nil || n == 1 {
						t.Fatal(n, err)
					}
					return
				}
				// A tombstone that stays is the one thing a success may leave.
				if err == nil && !(operation == "delete" && strings.HasPrefix(failed, "remove tmp/")) {
					t.Errorf("%s failed, and nobody noticed", failed)
				}
				if err != nil {
					wantClass(t, err, ErrNoSpace)
					wantClass(t, err, errInjected)
					if operation == "create" && len(list(t, p)) != 1 {
						t.Errorf("%s failed: volumes %v", failed, list(t, p))
					}
					if err := operations[operation](t.Context(), p); err != nil {
						t.Errorf("%s failed; repeated: %v", failed, err)
					}
				}
				if p.pending != 0 || len(p.building) != 0 {
					t.Errorf("%s failed: %d bytes and %d names are taken still", failed, p.pending, len(p.building))
				}
				if err := p.Close(); err != nil {
					t.Fatal(err)
				}
				examine(t, operation, dir, old, true)
			}
		})
	}
}

// TestOrderOfSteps fixes in which order things become durable: what a rename puts in place is durable before, the
// rename itself before success.
func TestOrderOfSteps(t *testing.T) {
	p := newPool(t)
	var steps []string
	p.dir.step = func(op, name string) error {
		for _, v := range p.volumes {
			name = strings.ReplaceAll(name, v.id, "ID")
		}
		for i, part := range strings.Split(name, "/") {
			if i == 1 && strings.HasPrefix(part, "v-") {
				name = strings.Replace(name, part, "ID", 1)
			}
		}
		steps = append(steps, op+" "+name)
		return nil
	}
	for _, c := range []struct {
		operation func() error
		want      []string
	}{
		{
			func() error { mustCreate(t, p, "v", mebibyte); return nil },
			[]string{
				"mkdir tmp/ID", "create tmp/ID/head.qcow2",
				"write tmp/ID/volume.json.new", "rename tmp/ID/volume.json", "sync tmp/ID",
				"move volumes/ID", "sync volumes", "sync tmp",
			},
		},
		{
			func() error {
				h := mustAcquire(t, p, p.names["v"].id)
				return errors.Join(h.SetFormat(t.Context(), Format{State: RawBlock}), h.Release())
			},
			[]string{"write volumes/ID/volume.json.new", "rename volumes/ID/volume.json", "sync volumes/ID"},
		},
		{
			func() error { return p.Delete(t.Context(), p.names["v"].id) },
			[]string{"move tmp/ID", "sync tmp", "sync volumes", "remove tmp/ID"},
		},
	} {
		steps = nil
		if err := c.operation(); err != nil {
			t.Fatal(err)
		}
		if !slices.Equal(steps, c.want) {
			t.Errorf("steps are\n%s\nwant\n%s", strings.Join(steps, "\n"), strings.Join(c.want, "\n"))
		}
	}
}
