// Package mountfake has a mount.Mounter in memory, for tests that need neither root nor devices. It passes the suite
// in mounttest.
//
// Devices, filesystems and mounts are state of the fake; targets are real directories and files, made and removed as
// the real Mounter does, so that callers which look at them find them. No data moves: what is written below a target
// stays in that directory, and Unmount then refuses to remove it.
package mountfake

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"syscall"

	"github.com/qcow-csi/qcow-csi/driver/mount"
)

// Major is the major number of all devices of a fake.
const Major = 240

// Call is one call of a method of mount.Mounter, as a hook sees it.
type Call struct {
	Op     string // "Probe", "Format", "Mount", ...
	Device string // or the source of a Bind; "" when the call has none
	Target string // "" when the call has none
}

// Mounter is a mount.Mounter in memory.
type Mounter struct {
	mu      sync.Mutex
	devices map[string]*device
	mounts  map[string]*mounted // by target
	hook    func(Call) error
	calls   []Call
}

var _ mount.Mounter = (*Mounter)(nil)

// device is a block device.
type device struct {
	minor      int
	size       int64
	content    mount.Content
	fsSize     int64 // of the filesystem, when there is one
	unreadable bool
}

// mounted is one mount.
type mounted struct {
	source     string // device, or the directory that is bound
	node       bool   // the device's node is bound, rather than its filesystem mounted
	fsType     string
	readOnly   bool
	fsReadOnly bool
	options    []string
}

// New returns a fake without devices.
func New() *Mounter {
	return &Mounter{devices: map[string]*device{}, mounts: map[string]*mounted{}}
}

// AddDevice makes a blank device of size bytes. One that exists keeps its content and gets the size.
func (m *Mounter) AddDevice(path string, size int64) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if d := m.devices[path]; d != nil {
		d.size = size
		return
	}
	m.devices[path] = &device{minor: len(m.devices), size: size, content: mount.Content{Blank: true}}
}

// RemoveDevice forgets a device and its content; what is mounted from it stays mounted.
func (m *Mounter) RemoveDevice(path string) {
	m.mu.Lock()
	defer m.mu.Unlock()
	delete(m.devices, path)
}

// SetContent puts content on a device, as if somebody else had.
func (m *Mounter) SetContent(path string, content mount.Content) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.devices[path].content = content
	m.devices[path].fsSize = m.devices[path].size
}

// SetUnreadable makes every read of a device fail, or work again.
func (m *Mounter) SetUnreadable(path string, unreadable bool) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.devices[path].unreadable = unreadable
}

// SetHook has hook called at the start of every call. If it returns an error the call fails with that; a Format that
// fails so has destroyed what was on the device, and left remains that nothing recognizes. nil removes it.
func (m *Mounter) SetHook(hook func(Call) error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.hook = hook
}

// Calls returns all calls so far whose Op is op, or all for "".
func (m *Mounter) Calls(op string) []Call {
	m.mu.Lock()
	defer m.mu.Unlock()
	return slices.DeleteFunc(slices.Clone(m.calls), func(c Call) bool { return op != "" && c.Op != op })
}

// Targets returns all targets on which something is mounted, sorted.
func (m *Mounter) Targets() []string {
	m.mu.Lock()
	defer m.mu.Unlock()
	return slices.Sorted(maps.Keys(m.mounts))
}

// enter records a call and asks the hook, without the lock, so that a hook may block and call the fake.
func (m *Mounter) enter(ctx context.Context, call Call) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	m.mu.Lock()
	m.calls = append(m.calls, call)
	hook := m.hook
	m.mu.Unlock()
	if hook == nil {
		return nil
	}
	return hook(call)
}

// Probe implements mount.Mounter.
func (m *Mounter) Probe(ctx context.Context, path string) (mount.Content, error) {
	if err := m.enter(ctx, Call{Op: "Probe", Device: path}); err != nil {
		return mount.Content{}, err
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	d, err := m.find(path)
	if err != nil {
		return mount.Content{}, err
	}
	if d.unreadable {
		return mount.Content{}, fmt.Errorf("%s: %w: %w", path, mount.ErrUnreadable, syscall.EIO)
	}
	return d.content, nil
}

// Format implements mount.Mounter.
func (m *Mounter) Format(ctx context.Context, path string, filesystem mount.Filesystem, _ bool) error {
	hooked := m.enter(ctx, Call{Op: "Format", Device: path})
	m.mu.Lock()
	defer m.mu.Unlock()
	d, err := m.find(path)
	if err != nil {
		return err
	}
	switch {
	case hooked != nil:
		d.content = mount.Content{}
		return hooked
	case filesystem.Validate() != nil:
		return filesystem.Validate()
	case d.size < mount.MinimumSize(filesystem.Type):
		return fmt.Errorf("%s: %w: too small for %s", path, mount.ErrInvalid, filesystem.Type)
	case m.inUse(path):
		return fmt.Errorf("%s: %w: mounted", path, mount.ErrBusy)
	case d.unreadable:
		return fmt.Errorf("%s: %w", path, syscall.EIO)
	}
	d.content, d.fsSize = mount.Content{Type: filesystem.Type}, d.size
	return nil
}

// Mount implements mount.Mounter.
func (m *Mounter) Mount(ctx context.Context, path, target string, filesystem mount.Filesystem) error {
	if err := m.enter(ctx, Call{Op: "Mount", Device: path, Target: target}); err != nil {
		return err
	}
	if err := filesystem.Validate(); err != nil {
		return err
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	d, err := m.find(path)
	if err != nil {
		return err
	}
	if d.unreadable || d.content.Type != filesystem.Type {
		return fmt.Errorf("mount %s: no %s there", path, filesystem.Type)
	}
	readOnly := filesystem.ReadOnly()
	_, err = m.add(target, true, mounted{
		source: path, fsType: filesystem.Type, readOnly: readOnly, fsReadOnly: readOnly, options: filesystem.Options,
	})
	return err
}

// Bind implements mount.Mounter.
func (m *Mounter) Bind(ctx context.Context, source, target string, readOnly bool) error {
	if err := m.enter(ctx, Call{Op: "Bind", Device: source, Target: target}); err != nil {
		return err
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	directory := m.devices[source] == nil
	bound := mounted{source: source, node: true, fsType: "devtmpfs"}
	if directory {
		info, err := os.Stat(source)
		if err != nil {
			return err
		}
		if !info.IsDir() {
			return fmt.Errorf("%s: %w: neither a directory nor a device", source, mount.ErrInvalid)
		}
		bound = mounted{source: source, fsType: "fake"}
		if n := m.mounts[filepath.Clean(source)]; n != nil {
			bound = *n
		}
	}
	n, err := m.add(target, directory, bound)
	if err != nil {
		return err
	}
	if n.readOnly && !readOnly && !bound.readOnly {
		return fmt.Errorf("%s: %w: bound read-only", target, mount.ErrBusy)
	}
	n.readOnly = n.readOnly || readOnly
	return nil
}

// add mounts n on target and returns what is mounted there: n, or the same from an earlier call.
func (m *Mounter) add(target string, directory bool, n mounted) (*mounted, error) {
	if !filepath.IsAbs(target) || filepath.Clean(target) == "/" {
		return nil, fmt.Errorf("target %q: %w", target, mount.ErrInvalid)
	}
	target = filepath.Clean(target)
	if there := m.mounts[target]; there != nil {
		if there.source != n.source || there.node != n.node {
			return nil, fmt.Errorf("%s: %w: %s is mounted there", target, mount.ErrBusy, there.source)
		}
		return there, nil
	}
	if err := makeTarget(target, directory); err != nil {
		return nil, err
	}
	m.mounts[target] = &n
	return &n, nil
}

func makeTarget(target string, directory bool) error {
	if directory {
		return os.MkdirAll(target, 0o755)
	}
	if err := os.MkdirAll(filepath.Dir(target), 0o755); err != nil {
		return err
	}
	f, err := os.OpenFile(target, os.O_CREATE|os.O_RDWR, 0o644)
	if err != nil {
		return err
	}
	return f.Close()
}

// Unmount implements mount.Mounter.
func (m *Mounter) Unmount(ctx context.Context, target string) error {
	if err := m.enter(ctx, Call{Op: "Unmount", Target: target}); err != nil {
		return err
	}
	if !filepath.IsAbs(target) || filepath.Clean(target) == "/" {
		return fmt.Errorf("target %q: %w", target, mount.ErrInvalid)
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	target = filepath.Clean(target)
	delete(m.mounts, target)
	info, err := os.Lstat(target)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	if !info.IsDir() && info.Size() > 0 {
		return fmt.Errorf("%s: %w: not empty", target, mount.ErrInvalid)
	}
	return os.Remove(target)
}

// Grow implements mount.Mounter.
func (m *Mounter) Grow(ctx context.Context, path, target string) error {
	if err := m.enter(ctx, Call{Op: "Grow", Device: path, Target: target}); err != nil {
		return err
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	d, err := m.find(path)
	if err != nil {
		return err
	}
	top := m.mounts[filepath.Clean(target)]
	switch {
	case top == nil || top.node || top.source != path:
		return fmt.Errorf("%s: %w on %s", path, mount.ErrNotMounted, target)
	case top.readOnly:
		return fmt.Errorf("%s: %w", target, mount.ErrReadOnly)
	}
	d.fsSize = max(d.fsSize, d.size)
	return nil
}

// Usage implements mount.Mounter. A filesystem is as large as its device was at the last Format or Grow, and empty.
func (m *Mounter) Usage(ctx context.Context, target string) (mount.Usage, error) {
	if err := m.enter(ctx, Call{Op: "Usage", Target: target}); err != nil {
		return mount.Usage{}, err
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	top := m.mounts[filepath.Clean(target)]
	if top == nil {
		return mount.Usage{}, fmt.Errorf("%s: %w", target, mount.ErrNotMounted)
	}
	d := m.devices[top.source]
	switch {
	case d == nil:
		return mount.Usage{}, fmt.Errorf("%s: %w", target, syscall.EIO)
	case top.node:
		return mount.Usage{TotalBytes: d.size}, nil
	}
	usage := mount.Usage{TotalBytes: d.fsSize, AvailableBytes: d.fsSize}
	if top.fsType != "btrfs" {
		usage.TotalInodes = d.fsSize / 16384
		usage.FreeInodes = usage.TotalInodes
	}
	return usage, nil
}

// Mounts implements mount.Mounter.
func (m *Mounter) Mounts(ctx context.Context, target string) ([]mount.Mount, error) {
	if err := m.enter(ctx, Call{Op: "Mounts", Target: target}); err != nil {
		return nil, err
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	n := m.mounts[filepath.Clean(target)]
	if n == nil {
		return nil, nil
	}
	entry := mount.Mount{
		Device: n.source, Type: n.fsType, ReadOnly: n.readOnly || n.fsReadOnly, Options: slices.Clone(n.options),
	}
	if d := m.devices[n.source]; d != nil {
		entry.Major, entry.Minor = Major, d.minor
	}
	return []mount.Mount{entry}, nil
}

func (m *Mounter) find(path string) (*device, error) {
	if d := m.devices[path]; d != nil {
		return d, nil
	}
	return nil, fmt.Errorf("device %s: %w", path, fs.ErrNotExist)
}

// inUse says whether the device's filesystem is mounted.
func (m *Mounter) inUse(path string) bool {
	for _, n := range m.mounts {
		if n.source == path && !n.node {
			return true
		}
	}
	return false
}
