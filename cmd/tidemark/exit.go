package main

import (
	"context"
	"errors"

	"tidemark/internal/control/api"
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

// Exit codes; docs/operating.md lists them. They are never given another meaning.
const (
	exitOK          = 0
	exitFailure     = 1   // anything without a code of its own
	exitUsage       = 2   // wrong arguments
	exitNoDaemon    = 3   // no daemon answers
	exitNotFound    = 4   // no such group, disk, device or point
	exitRefused     = 5   // refused to protect somebody's data, or impossible here
	exitNotAVault   = 6   // the place is not a vault
	exitDamaged     = 7   // stored data is not what was written
	exitInsideGap   = 8   // there is no consistent point there
	exitInUse       = 9   // somebody else has it
	exitUnreachable = 10  // vault, disk or ring is away or full: try again later
	exitInterrupted = 130 // by a signal
)

// usageError is wrong usage of the command line.
type usageError struct{ error }

func (e usageError) Unwrap() error { return e.error }

var byAPI = map[api.Code]int{
	api.CodeUsage: exitUsage, api.CodeNoDaemon: exitNoDaemon, api.CodeNotFound: exitNotFound, api.CodeRefused: exitRefused,
	api.CodeNotAVault: exitNotAVault, api.CodeDamaged: exitDamaged, api.CodeInsideGap: exitInsideGap, api.CodeInUse: exitInUse,
	api.CodeUnreachable: exitUnreachable,
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
		{stream.ErrBadPoint, exitUsage}, {vault.ErrScheme, exitUsage}, {vault.ErrName, exitUsage},
		{timeline.ErrInsideGap, exitInsideGap}, {timeline.ErrNoPoint, exitNotFound}, {timeline.ErrNoDisk, exitNotFound},
		{vault.ErrNoGroup, exitNotFound}, {disk.ErrNotFound, exitNotFound}, {disk.ErrNotBlock, exitRefused}, {vault.ErrNotVault, exitNotAVault}, {segment.ErrDamaged, exitDamaged},
		{restore.ErrInUse, exitInUse}, {restore.ErrProtected, exitInUse}, {restore.ErrTooSmall, exitRefused},
		{restore.ErrNotEmpty, exitRefused}, {restore.ErrDirectory, exitRefused}, {restore.ErrKind, exitRefused}, {restore.ErrVault, exitRefused},
		{mount.ErrNoFileSystem, exitNotFound}, {mount.ErrPartition, exitUsage}, {mount.ErrSameFS, exitInUse}, {mount.ErrDir, exitUsage},
		{vault.ErrUnreachable, exitUnreachable}, {daemon.ErrRunning, exitInUse}, {nbd.ErrURI, exitUsage}, {nbd.ErrSocketInUse, exitInUse},
	} {
		if errors.Is(err, c.is) {
			return c.code
		}
	}
	return exitFailure
}
