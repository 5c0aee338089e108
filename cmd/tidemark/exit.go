package main

import (
	"context"
	"errors"
	"io/fs"

	"golang.org/x/sys/unix"

	"tidemark/internal/control/api"
	"tidemark/internal/control/metrics"
	"tidemark/internal/daemon"
	"tidemark/internal/disk"
	"tidemark/internal/front/nbd"
	"tidemark/internal/mount"
	"tidemark/internal/restore"
	"tidemark/internal/segment"
	"tidemark/internal/stream"
	"tidemark/internal/timeline"
	"tidemark/internal/vault"
)

// Exit codes. They are never given another meaning.
const (
	exitOK          = 0
	exitFailure     = 1
	exitUsage       = 2
	exitNoDaemon    = 3
	exitNotFound    = 4
	exitRefused     = 5
	exitNotAVault   = 6
	exitDamaged     = 7
	exitInsideGap   = 8
	exitInUse       = 9
	exitUnreachable = 10
	exitFullCopy    = 11
	exitNothing     = 12
	exitNotGiven    = 13
	exitInterrupted = 130
)

// exitMeanings is the table in docs/operating.md; a test holds the two together.
var exitMeanings = map[int]string{
	exitOK:          "done",
	exitFailure:     "failed in a way without a code of its own",
	exitUsage:       "wrong usage: an argument or flag is missing, unknown or out of bounds; nothing was changed",
	exitNoDaemon:    "no daemon answers",
	exitNotFound:    "no such group, disk, device, file or point",
	exitRefused:     "refused, to protect somebody's data or for want of permission, or impossible here",
	exitNotAVault:   "not a vault",
	exitDamaged:     "damaged, or different from the disk",
	exitInsideGap:   "inside a gap: there is no consistent point",
	exitInUse:       "in use: by another daemon, group, mount or freeze",
	exitUnreachable: "vault, disk or ring is away or full: try again",
	exitFullCopy:    "not known any more what changed since then: take a full copy",
	exitNothing:     "nothing is pending for the consumer, or not enough in time",
	exitNotGiven:    "not a batch that the consumer can commit, or go on from",
	exitInterrupted: "interrupted by a signal",
}

// usageError is wrong usage of the command line.
type usageError struct{ error }

func (e usageError) Unwrap() error { return e.error }

var byAPI = map[api.Code]int{
	api.CodeUsage: exitUsage, api.CodeNoDaemon: exitNoDaemon, api.CodeNotFound: exitNotFound, api.CodeRefused: exitRefused,
	api.CodeNotAVault: exitNotAVault, api.CodeDamaged: exitDamaged, api.CodeInsideGap: exitInsideGap, api.CodeInUse: exitInUse,
	api.CodeUnreachable: exitUnreachable, api.CodeFullCopy: exitFullCopy, api.CodeNothing: exitNothing, api.CodeNotGiven: exitNotGiven,
}

// exitCode is the one place where errors become exit codes.
func exitCode(ctx context.Context, err error) int {
	if ctx.Err() != nil && errors.Is(err, context.Canceled) || errors.Is(err, restore.ErrInterrupted) {
		return exitInterrupted
	}
	var usage usageError
	if errors.As(err, &usage) {
		return exitUsage
	}
	if code, ok := byAPI[api.CodeOf(err)]; ok {
		return code
	}
	for _, c := range []struct {
		is   error
		code int
	}{
		{fs.ErrPermission, exitRefused}, // of whatever: no waiting mends it
		{stream.ErrBadPoint, exitUsage}, {vault.ErrScheme, exitUsage}, {vault.ErrName, exitUsage},
		{timeline.ErrInsideGap, exitInsideGap}, {timeline.ErrNoPoint, exitNotFound}, {timeline.ErrNoDisk, exitNotFound},
		{vault.ErrNoGroup, exitNotFound}, {disk.ErrNotFound, exitNotFound}, {disk.ErrNotBlock, exitRefused}, {vault.ErrNotVault, exitNotAVault}, {segment.ErrDamaged, exitDamaged},
		{restore.ErrInUse, exitInUse}, {restore.ErrProtected, exitInUse}, {restore.ErrTooSmall, exitRefused},
		{restore.ErrNotEmpty, exitRefused}, {restore.ErrDirectory, exitRefused}, {restore.ErrKind, exitRefused}, {restore.ErrVault, exitRefused},
		{mount.ErrNoFileSystem, exitNotFound}, {mount.ErrPartition, exitUsage}, {mount.ErrSameFS, exitInUse}, {mount.ErrDir, exitUsage}, {mount.ErrTaken, exitInUse},
		{vault.ErrUnreachable, exitUnreachable}, {daemon.ErrRunning, exitInUse}, {daemon.ErrCompat, exitUsage}, {daemon.ErrCompatVault, exitUsage}, {metrics.ErrAddress, exitUsage}, {metrics.ErrTaken, exitInUse}, {metrics.ErrListen, exitRefused}, {daemon.ErrState, exitRefused}, {daemon.ErrSocket, exitRefused},
		{nbd.ErrURI, exitUsage}, {nbd.ErrCertificates, exitUsage}, {nbd.ErrSocketInUse, exitInUse},
		// Last, what the kernel says of a path that nothing above has a word for.
		{unix.ENOSPC, exitUnreachable}, {fs.ErrNotExist, exitNotFound}, {unix.EROFS, exitRefused}, {unix.ENOTDIR, exitNotFound},
	} {
		if errors.Is(err, c.is) {
			return c.code
		}
	}
	return exitFailure
}
