package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"k8s.io/klog/v2"

	"github.com/qcow-csi/qcow-csi/driver"
	"github.com/qcow-csi/qcow-csi/driver/attach"
	"github.com/qcow-csi/qcow-csi/driver/attach/fuse"
	"github.com/qcow-csi/qcow-csi/driver/attach/nbd"
	"github.com/qcow-csi/qcow-csi/driver/mount"
	"github.com/qcow-csi/qcow-csi/driver/pool"
)

// Together less than the 30 seconds that kubelet grants a container to end.
const (
	callsGrace = 10 * time.Second // for calls that are running
	syncGrace  = 15 * time.Second // for bringing into the images what pods wrote
)

// kubeletDirs are where kubelets keep what they delete without asking.
var kubeletDirs = []string{"/var/lib/kubelet", "/var/lib/k0s/kubelet", "/var/snap/microk8s/common/var/lib/kubelet"}

type allOptions struct {
	endpoint, storageDir, runDir, nodeID, driverName, attacher string
	maxVolumes                                                 int64
}

func newAllCommand() *cobra.Command {
	var o allOptions
	cmd := &cobra.Command{
		Use:   "all",
		Short: "Run the CSI driver of a single node: identity, controller and node service on one socket",
		Long: `Run the CSI driver of a single node: identity, controller and node service on one socket.

It needs root. SIGTERM ends it in good order: it takes no more calls, finishes those that are running, and flushes
and closes every image. Volumes that are still in use lose their device with it.

The log levels (-v): 0 what an operator wants to know, 2 calls that change something, 4 their content without secrets,
6 and 8 the same for calls that come all the time.`,
		Example: `  qcow-csi all --storage-dir /var/lib/qcow-csi --node-id $(hostname)
  qcow-csi all --endpoint unix:///run/csi.sock --storage-dir /mnt/images --node-id node-1 --attacher fuse -v 2`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error { return runAll(cmd.Context(), o) },
	}
	hostname, _ := os.Hostname() // without one the flag has to be given
	flags := cmd.Flags()
	flags.StringVar(&o.endpoint, "endpoint", "unix:///csi/csi.sock", "unix socket to serve CSI on")
	flags.StringVar(&o.storageDir, "storage-dir", "", "existing directory for volumes; an empty one becomes a new pool")
	flags.StringVar(&o.runDir, "run-dir", defaultRunDir, "directory in memory (tmpfs) for what has to outlive the driver, but not the machine; \"none\" does without")
	flags.StringVar(&o.nodeID, "node-id", hostname, "name of this node, as Kubernetes knows it")
	flags.StringVar(&o.driverName, "driver-name", driver.DefaultName, "name of the driver, as StorageClass objects have it")
	flags.StringVar(&o.attacher, "attacher", attach.Auto, "how images become block devices: auto, nbd or fuse")
	flags.Int64Var(&o.maxVolumes, "max-volumes", 0, "how many volumes the node can have staged; 0: no limit is reported")
	return cmd
}

// runAll runs until ctx ends.
func runAll(ctx context.Context, o allOptions) (err error) {
	moreThreads()
	logger := klog.FromContext(ctx)
	dir, err := storageDirectory(o.storageDir)
	if err != nil {
		return err
	}
	journals, err := openJournals(o.runDir)
	if err != nil {
		return err
	}
	p, err := pool.Open(ctx, dir, pool.Options{Journals: journals})
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, p.Close()) }()
	attacher, err := selectAttacher(ctx, o.attacher, o.driverName)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, attacher.Close()) }()
	d, err := driver.New(driver.Config{
		Name: o.driverName, Version: programVersion(), NodeID: o.nodeID, MaxVolumes: o.maxVolumes,
		Pool: p, Attacher: attacher, Mounter: mount.New(),
	})
	if err != nil {
		return err
	}
	listener, err := driver.Listen(ctx, o.endpoint)
	if err != nil {
		return err
	}
	logger.Info("serving", "version", programVersion(), "driver", o.driverName, "node", o.nodeID,
		"pool", p.ID(), "storage", dir, "endpoint", o.endpoint)
	err = d.Serve(ctx, listener, callsGrace)
	logger.Info("stopping")
	stopping, cancel := context.WithTimeout(context.WithoutCancel(ctx), syncGrace)
	defer cancel()
	d.Shutdown(stopping)
	return err
}

// selectAttacher returns the attacher of that name, or the first that this kernel can do.
func selectAttacher(ctx context.Context, name, owner string) (attach.Attacher, error) {
	candidates := []attach.Attacher{nbd.New(nbd.Options{Owner: owner}), fuse.New(fuse.Options{Owner: owner})}
	taken, reason, err := attach.Select(ctx, name, candidates...)
	if err != nil {
		return nil, err
	}
	for _, c := range candidates {
		if c != taken {
			if err := c.Close(); err != nil {
				return nil, errors.Join(err, taken.Close())
			}
		}
	}
	klog.FromContext(ctx).Info("attaching", "attacher", taken.Name(), "reason", reason)
	return taken, nil
}

// storageDirectory returns the real path of the storage directory. It refuses one that kubelet might clean up.
func storageDirectory(name string) (string, error) {
	if name == "" {
		return "", errors.New("--storage-dir is missing")
	}
	dir, err := filepath.Abs(name)
	if err == nil {
		dir, err = filepath.EvalSymlinks(dir)
	}
	if err != nil {
		return "", fmt.Errorf("--storage-dir: %w", err)
	}
	for _, k := range kubeletDirs {
		if resolved, err := filepath.EvalSymlinks(k); err == nil {
			k = resolved
		}
		if dir == k || strings.HasPrefix(dir, k+"/") {
			return "", fmt.Errorf("--storage-dir %s is inside %s, where kubelet deletes what it does not know", dir, k)
		}
	}
	return dir, nil
}
